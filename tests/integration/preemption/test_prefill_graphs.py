"""Graphs for short prefills: the choice, on a stand-in for SGLang's runner, and that SGLang's own is as expected."""

from __future__ import annotations

import pytest

from flowprefill_sglang.integration.preemption import prefill_graphs
from flowprefill_sglang.integration.preemption.prefill_graphs import GraphChoice
from flowprefill_sglang.prefill_worker.run_ahead import Cost, InStep
from flowprefill_testing.sglang_process import facts_of


class Runner:
    """Replays what is small enough, like SGLang's."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def can_run_graph(self, forward_batch: int) -> bool:
        self.asked.append(forward_batch)
        return forward_batch <= 100


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> GraphChoice:
    fresh = GraphChoice()
    monkeypatch.setattr(prefill_graphs, "choice", fresh)
    return fresh


def test_only_short_tasks_may_replay_and_only_what_sglang_has_captured(choice: GraphChoice) -> None:
    (hook,) = prefill_graphs.hooks()
    runner, device = Runner(), InStep(short_s=2e-3)
    choice.leave_to(lambda: device.is_short)

    def may_replay(seconds: float, tokens: int) -> bool:
        device.runs(Cost(0.0, seconds))
        return bool(hook.function(Runner.can_run_graph, runner, tokens))

    assert may_replay(1e-3, 64)
    assert may_replay(2e-3, 64)
    assert not may_replay(1e-3, 128), "SGLang has no graph for it"
    assert not may_replay(2.1e-3, 64), "nothing could stop in it"
    assert runner.asked == [64, 64, 128]


def test_forward_passes_outside_of_tasks_replay_nothing(choice: GraphChoice) -> None:
    (hook,) = prefill_graphs.hooks()
    assert not hook.function(Runner.can_run_graph, Runner(), 1)


def test_sglangs_runner_is_as_expected() -> None:
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of(
        """
        import inspect, pkgutil
        from sglang.srt.model_executor.model_runner import ModelRunner
        from flowprefill_sglang.integration.preemption.prefill_graphs import TARGET

        facts["parameters"] = list(inspect.signature(pkgutil.resolve_name(TARGET)).parameters)
        facts["source"] = inspect.getsource(ModelRunner._forward_raw)
        """
    )
    assert facts["parameters"] == ["self", "forward_batch"]
    for call in ("self.prefill_cuda_graph_runner.can_run_graph(forward_batch)", "prefill_cuda_graph_runner.execute("):
        assert call in facts["source"]
