"""How a server starts its processes without an accelerator, and where it finds its model's class. That servers work so
is in ``cluster``."""

from __future__ import annotations

import pytest

from flowprefill_sglang.integration.cpu_start import FEW_MODELS, MODELS_VARIABLE, prefer_few_models
from flowprefill_sglang.integration.platform import has_accelerator
from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")


@pytest.fixture(autouse=True)
def _no_accelerator() -> None:
    if has_accelerator():
        pytest.skip("nothing is changed where there is an accelerator")


def test_a_package_of_the_users_own_stays() -> None:
    nothing, own = dict[str, str](), {MODELS_VARIABLE: "own"}
    prefer_few_models(nothing)
    prefer_few_models(own)
    assert (nothing, own) == ({MODELS_VARIABLE: FEW_MODELS}, {MODELS_VARIABLE: "own"})


STARTS = """
    import multiprocessing, os, threading
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints import engine
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.server_args import ServerArgs

    cls, architecture = ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])
    facts["llama"] = [cls.__module__, "sglang.srt.models.gpt2" in sys.modules]
    cls, architecture = ModelRegistry.resolve_model_cls(["GPT2LMHeadModel"])
    facts["gpt2"] = [cls.__module__, architecture]
    again, _ = ModelRegistry.resolve_model_cls("Qwen3ForCausalLM")
    facts["qwen3"] = again.__module__

    multiprocessing.set_start_method("spawn", force=True)
    args = ServerArgs(model_path="dummy")
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    engine._set_envs_and_config(args)
    facts["beside a thread"] = multiprocessing.get_start_method()
    leave.set()
    other.join()
    engine._set_envs_and_config(args)
    facts["alone"] = multiprocessing.get_start_method()
"""


def test_processes_are_forked_and_one_models_file_is_imported() -> None:
    facts = facts_of(STARTS)
    assert facts["llama"] == ["sglang.srt.models.llama", False]
    assert facts["gpt2"] == ["sglang.srt.models.gpt2", "GPT2LMHeadModel"], "all others are found still"
    assert facts["qwen3"] == "sglang.srt.models.qwen3"
    assert facts["beside a thread"] == "spawn"
    assert facts["alone"] == "fork"
