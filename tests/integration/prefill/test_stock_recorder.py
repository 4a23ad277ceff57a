"""SGLang's own steps as events, with stand-ins for its requests and batches; nothing of SGLang's is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill_sglang.integration.prefill import stock_recorder
from flowprefill_sglang.observe.events import RequestArrived, TaskFinished, TaskStarted
from flowprefill_sglang.prefill_worker.settings import SchedulerKind, SchedulerSettings
from flowprefill_testing.sglang_process import facts_of

SETTINGS = SchedulerSettings(kind=SchedulerKind.STOCK, default_objective_s=7.0)


class Reporter:
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.flushed = 0

    def record(self, event: object) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushed = len(self.events)


def req(rid: str, tokens: int, *, prefix: int = 0, middle_chunks: int = 0, **params: object) -> SimpleNamespace:
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=[0] * tokens,
        extend_len=tokens - prefix,
        prefix_len=prefix,
        inflight_middle_chunks=middle_chunks,
        priority=None,
        finished_reason=None,
        to_finish=None,
        sampling_params=SimpleNamespace(custom_params=params or None),
        time_stats=SimpleNamespace(scheduler_recv_time=100.0),
    )


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    reporter = Reporter()
    monkeypatch.setattr(stock_recorder, "from_environment", lambda: reporter)
    return reporter


def hook(target: str, hooks: list[Any]) -> Any:
    (found,) = [hook.function for hook in hooks if hook.target.endswith(f".{target}")]
    return found


def test_an_arrival(reporter: Reporter) -> None:
    after = hook("pop_bootstrapped", stock_recorder.hooks(SETTINGS))
    assert after([req("r", 30), req("s", 5, ttft_slo_ms=250.0)], object()) is None
    first, second = reporter.events
    assert isinstance(first, RequestArrived)
    assert (first.rid, first.tokens, first.received_at, first.deadline_at) == ("r", 30, 100.0, 107.0)
    assert second.deadline_at == 100.25


def test_a_poll_that_brings_nothing_says_nothing(reporter: Reporter) -> None:
    hook("pop_bootstrapped", stock_recorder.hooks(SETTINGS))([], object())
    assert reporter.events == []


def test_a_batch_is_a_task(reporter: Reporter) -> None:
    around = hook("run_batch", stock_recorder.hooks(SETTINGS))
    batch = SimpleNamespace(reqs=[req("r", 30, prefix=10), req("s", 5, ttft_slo_ms=250.0)])
    got = around(lambda *args, **kwargs: (args, kwargs), "scheduler", batch, 3, flag=True)
    assert got == (("scheduler", batch, 3), {"flag": True}), "as SGLang called it"
    started, finished = reporter.events
    assert isinstance(started, TaskStarted)
    assert isinstance(finished, TaskFinished)
    assert started.task == finished.task
    assert (started.rids, started.new_tokens, started.cached_tokens) == (["r", "s"], 25, 10)
    assert started.deadline_at == 100.25
    assert finished.executed_s == finished.at - started.at
    around(lambda *_: None, "scheduler", batch)
    assert reporter.events[-1].task != started.task


def test_a_batch_that_fails_is_not_finished(reporter: Reporter) -> None:
    around = hook("run_batch", stock_recorder.hooks(SETTINGS))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        around(fail, "scheduler", SimpleNamespace(reqs=[req("r", 3)]))
    assert [type(event) for event in reporter.events] == [TaskStarted]


def test_only_last_chunks_end_requests() -> None:
    """SGLang counts a chunk down while it takes the result, and takes half-done requests out of the batch."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of("""
        from types import SimpleNamespace

        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.managers.schedule_batch import FINISH_ABORT
        from flowprefill_sglang.integration.prefill import stock_recorder
        from flowprefill_sglang.prefill_worker.settings import SchedulerSettings

        events = []
        reporter = SimpleNamespace(record=events.append, flush=lambda: None)
        stock_recorder.from_environment = lambda: reporter
        hooks = stock_recorder.hooks(SchedulerSettings())
        (around,) = [hook.function for hook in hooks if "process_batch_result" in hook.target]

        def req(rid, chunks, reason=None):
            return SimpleNamespace(
                rid=rid, inflight_middle_chunks=chunks, finished_reason=reason, to_finish=None, priority=None,
                sampling_params=SimpleNamespace(custom_params=None),
                time_stats=SimpleNamespace(scheduler_recv_time=1.0),
            )

        batch = SimpleNamespace(reqs=[req("whole", 0), req("half", 1), req("aborted", 0, FINISH_ABORT())])

        def take(scheduler, batch, result):
            events.append("taken")
            batch.reqs[1].inflight_middle_chunks -= 1

        around(take, "scheduler", batch, "result")
        facts["events"] = [e if e == "taken" else [e.rid, e.outcome] for e in events]
    """)
    assert facts["events"] == ["taken", ["whole", "prefilled"], ["aborted", "aborted"]]
