"""A server without an accelerator starts in less than half the CPU time: what SGLang imports is imported once.

SGLang 0.5.23 spawns its scheduler and its detokenizer, so that each imports PyTorch, transformers and SGLang again, and
imports all of its model files (some two hundred) to find one class. It has to spawn because a process that has used
CUDA cannot be forked. Without an accelerator a fork of the server's process, before that has any other thread, has
everything already, and shares its memory. The model files are left out by SGLang's own means: a package of external
models, which is asked first (``few_models``).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Final

from flowprefill_sglang.integration.hooks import Hook, HookKind

MODELS_VARIABLE: Final = "SGLANG_EXTERNAL_MODEL_PACKAGE"
FEW_MODELS: Final = f"{__name__.rpartition('.')[0]}.few_models"


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers where no accelerator was found."""
    return [
        Hook(
            target="sglang.srt.entrypoints.engine._set_envs_and_config",
            kind=HookKind.AFTER,
            function=fork_from_now_on,
            why="every process of a server imports PyTorch and SGLang again",
        )
    ]


def prefer_few_models(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have SGLang look among ``few_models`` first, and among all others only when the model is not one of them. A
    package of the user's own stays."""
    environment.setdefault(MODELS_VARIABLE, FEW_MODELS)


def fork_from_now_on(result: None, server_args: Any) -> None:  # of the hooked function; SGLang's ServerArgs
    """After ``_set_envs_and_config``, which chooses ``spawn`` and is called before anything is started.

    A process with other threads stays with ``spawn``: a lock that one of them holds would be held for ever in a fork.
    """
    if not sys.platform.startswith("linux") or threading.active_count() > 1:
        return
    # A collection writes into every object that it looks at, and a page that was written to is no longer shared.
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)
