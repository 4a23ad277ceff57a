"""Entry point of ``sglang.srt.plugins``: what FlowPrefill adds to every SGLang process.

SGLang loads plugins in each of its processes (launcher, scheduler, detokenizer), so this runs in all of them, before
arguments are parsed. Nothing here depends on the role: a decode instance, which is stock SGLang otherwise, gets the
same KV transfer backend, the same health checks and, on a machine without accelerator, the same CPU fixes as a prefill
worker.

Only the standard library and our own light modules are imported at the top: SGLang swallows an import error here.
"""

from __future__ import annotations

import os

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import Hook, missing, stop, verify_when_applied
from flowprefill_sglang.integration.hooks import register as register_hooks
from flowprefill_sglang.prefill_worker.settings import SchedulerKind, SchedulerSettings, published

_registered: list[Hook] = []  # this process's hooks; filled once by register()


def register() -> None:
    """Called by SGLang's plugin loader. Ends the process when something cannot be set up."""
    if _registered:
        return
    try:
        _register()
    except StartupError as error:
        stop(error)
    except Exception as error:  # the loader would log it and serve without FlowPrefill
        stop(StartupError(f"the plugin could not be set up: {type(error).__name__}: {error}"))


def _register() -> None:
    from flowprefill_sglang.integration import (
        cpu_arithmetic,
        cpu_disaggregation,
        cpu_heap,
        cpu_lora,
        cpu_start,
        detokenizer,
        platform,
        transfer_backend,
    )
    from flowprefill_sglang.integration.prefill import request_terms

    # The eager runner otherwise copies each batch's inputs into one static buffer per process, which a suspended
    # forward would share with the running one. Inherited by the scheduler processes.
    os.environ.setdefault("SGLANG_EAGER_INPUT_NO_COPY", "1")
    transfer_backend.prepare()
    hooks = [*transfer_backend.hooks(), *request_terms.hooks(), *detokenizer.hooks()]
    checks = [transfer_backend.check, request_terms.check, detokenizer.check]
    settings = published()
    if settings is not None:
        hooks += _scheduler_hooks(settings)
    if not platform.has_accelerator():
        hooks += [*cpu_disaggregation.hooks(), *cpu_arithmetic.hooks(), *cpu_lora.hooks(), *cpu_start.hooks()]
        checks.append(cpu_disaggregation.check)
        cpu_start.prefer_few_models()
        cpu_heap.keep_memory()
        # SGLang's HTTP process otherwise waits a minute for the GPU's dump before it ends with a scheduler that crashed
        # or hangs, and answers nobody meanwhile.
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
    register_hooks(hooks)
    verify_when_applied(hooks, checks)
    _registered.extend(hooks)


def _scheduler_hooks(settings: SchedulerSettings) -> list[Hook]:
    """What a prefill worker's processes get beside."""
    from flowprefill_sglang.integration.preemption import prefill_graphs
    from flowprefill_sglang.integration.prefill import control, start, stock_recorder, wakeup

    if settings.kind is SchedulerKind.STOCK:
        return stock_recorder.hooks(settings)
    return [*start.hooks(settings), *control.hooks(), *wakeup.hooks(), *prefill_graphs.hooks()]


def require_loaded() -> None:
    """Raise StartupError unless this process has FlowPrefill's hooks; called by the shells that cannot do without."""
    if not _registered:
        allowed = os.environ.get("SGLANG_PLUGINS")
        hint = (
            f"SGLANG_PLUGINS={allowed!r} leaves it out; add 'flowprefill', and 'flowprefill_cpu' where there is no GPU"
            if allowed
            else "its entry point was not found: install the package (pip install flowprefill-sglang)"
        )
        raise StartupError(f"SGLang did not load the FlowPrefill plugin: {hint}")
    if missing(_registered):
        raise StartupError("SGLang has loaded the FlowPrefill plugin, but its hooks were removed again")
