"""What turns SGLang's scheduler process into a FlowPrefill one: every hook is looked for, and settings of SGLang's that
assume its loop are adapted."""

from __future__ import annotations

from typing import Any

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

HOOKS = """
    import pkgutil

    from flowprefill_sglang.integration import plugin
    from flowprefill_sglang.integration.hooks import missing
    from flowprefill_sglang.prefill_worker.settings import SchedulerKind, SchedulerSettings, publish

    publish(SchedulerSettings(kind=SchedulerKind({kind!r})))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    hooks = plugin._scheduler_hooks(SchedulerSettings(kind=SchedulerKind({kind!r})))
    targets = {{hook.target for hook in hooks}}
    facts["targets"] = sorted(targets)
    registered = [hook for hook in plugin._registered if hook.target in targets]
    facts["missing"] = [hook.target for hook in missing(registered)]
    facts["found broken"] = []
    for hook in registered:
        owner_name, _, name = hook.target.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        applied = owner.__dict__[name]
        setattr(owner, name, lambda *args, **kwargs: None)  # as if SGLang had not applied it
        facts["found broken"] += [found.target for found in missing(registered)]
        setattr(owner, name, applied)
"""

ADAPTED = """
    from types import SimpleNamespace

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from flowprefill_sglang.integration.prefill.start import _adapt
    from flowprefill_sglang.prefill_worker.boundaries import Gate

    gate, pool_tokens, page_tokens = Gate(), 6592, 16
    scheduler = SimpleNamespace(
        idle_sleeper="SGLang's", forward_ct=3, page_size=page_tokens, soft_watchdog=None,
        grammar_manager=SimpleNamespace(SGLANG_GRAMMAR_POLL_INTERVAL=0.005),
        watchdog=SimpleNamespace(get_counter=lambda: 3),
        disagg_prefill_bootstrap_queue=SimpleNamespace(max_input_len=6600),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: pool_tokens),
    )
    _adapt(scheduler, gate)
    before = scheduler.watchdog.get_counter()
    gate.boundaries += 1
    at_a_boundary = scheduler.watchdog.get_counter()
    scheduler.forward_ct += 1
    facts["counter"] = [before, at_a_boundary, scheduler.watchdog.get_counter()]
    longest = scheduler.disagg_prefill_bootstrap_queue.max_input_len
    facts["admitted"] = longest + 1 + page_tokens < pool_tokens  # SGLang's PrefillAdder.add_one_req
    facts["lost tokens"] = pool_tokens - longest
    facts["sleeper"] = scheduler.idle_sleeper
"""


@pytest.mark.parametrize("kind", ["flowprefill", "stock"])
def test_a_hook_that_is_not_applied_is_found(kind: str) -> None:
    facts = facts_of(HOOKS.format(kind=kind))
    assert facts["missing"] == []
    assert facts["targets"]
    assert sorted(facts["found broken"]) == facts["targets"], "each of them, and only it"


@pytest.fixture(scope="module")
def adapted() -> dict[str, Any]:
    return facts_of(ADAPTED)


def test_boundaries_are_progress_for_the_watchdog(adapted: dict[str, Any]) -> None:
    """Or it would end a worker that preempts for a long time; without progress it still ends one that hangs."""
    before, at_a_boundary, at_a_forward = adapted["counter"]
    assert before < at_a_boundary < at_a_forward


def test_sglangs_intake_takes_only_what_its_admission_will(adapted: dict[str, Any]) -> None:
    assert adapted["admitted"]
    assert adapted["lost tokens"] < 3 * 16


def test_the_loop_sleeps_in_its_own_bed(adapted: dict[str, Any]) -> None:
    assert adapted["sleeper"] is None
