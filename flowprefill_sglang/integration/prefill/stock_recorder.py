"""Watches SGLang's own prefill loop and reports it in the same events as FlowPrefill's, for comparison.

For ``--prefill-scheduler stock``. Nothing is changed: what runs, in which order and when is SGLang 0.5.23's doing. A
stock batch is reported as a task that is never preempted. On an asynchronous device with SGLang's overlap scheduling a
task's times are those of its launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final

from torch import distributed

from flowprefill_sglang.integration.hooks import Hook, HookKind
from flowprefill_sglang.integration.prefill.request_terms import terms_of
from flowprefill_sglang.observe.events import Outcome, RequestArrived, RequestEnded, TaskFinished, TaskStarted
from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter, from_environment
from flowprefill_sglang.prefill_worker.settings import SchedulerSettings

MIXIN: Final = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin"


class StockRecorder:
    """Turns SGLang's own steps into events. Owned by the scheduler's thread, on which SGLang calls it."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._numbers = count()
        self._made: SchedulerReporter | None = None

    @property
    def _reporter(self) -> SchedulerReporter:
        """Made at the first event: by then this process is known to be the scheduler, and metrics may be imported.
        Silent on all ranks but the first: they do the same."""
        if self._made is None:
            leads = not distributed.is_initialized() or distributed.get_rank() == 0
            self._made = from_environment() if leads else SchedulerReporter(None)
        return self._made

    def arrived(self, reqs: Sequence[Any]) -> None:  # SGLang's Req
        """These requests can be prefilled from now on."""
        for req in reqs:
            now = time.monotonic()
            terms = terms_of(req, now, self._settings.default_objective_s)
            self._reporter.record(
                RequestArrived(
                    at=now,
                    rid=terms.rid,
                    tokens=len(req.origin_input_ids),
                    slo_class=terms.slo_class,
                    received_at=terms.received_at,
                    deadline_at=terms.deadline_at,
                    dispatch_rid=terms.dispatch_rid,
                )
            )  # sent with the end of the batch that comes next: a send costs as much as a small round

    def run(self, run_batch: Callable[[], Any], batch: Any) -> Any:  # SGLang's ScheduleBatch and its result
        """Run a batch, as a task."""
        task, began_at = next(self._numbers), time.monotonic()
        rids = [req.rid for req in batch.reqs]
        new_tokens = sum(req.extend_len for req in batch.reqs)
        self._reporter.record(
            TaskStarted(
                at=began_at,
                task=task,
                rids=rids,
                new_tokens=new_tokens,
                cached_tokens=sum(req.prefix_len for req in batch.reqs),
                predicted_s=0.0,
                deadline_at=min(self._deadline_at(req, began_at) for req in batch.reqs),
            )
        )
        result = run_batch()
        ended_at = time.monotonic()
        self._reporter.record(
            TaskFinished(
                at=ended_at,
                task=task,
                rids=rids,
                new_tokens=new_tokens,
                executed_s=ended_at - began_at,
                predicted_s=0.0,
                preemptions=0,
            )
        )
        return result

    def ended(self, reqs: Sequence[Any]) -> None:
        """These requests have their first token, or were aborted."""
        from sglang.srt.disaggregation.utils import is_aborted

        now = time.monotonic()
        for req in reqs:
            terms = terms_of(req, now, self._settings.default_objective_s)
            outcome = Outcome.ABORTED if is_aborted(req) else Outcome.PREFILLED
            self._reporter.record(
                RequestEnded(
                    at=now,
                    rid=terms.rid,
                    outcome=outcome,
                    slo_class=terms.slo_class,
                    first_token_s=now - terms.received_at,
                    is_in_time=outcome is Outcome.PREFILLED and now <= terms.deadline_at,
                )
            )
        self._reporter.flush()

    def _deadline_at(self, req: Any, now: float) -> float:
        return terms_of(req, now, self._settings.default_objective_s).deadline_at


def hooks(settings: SchedulerSettings) -> list[Hook]:
    """Watch where requests enter, batches run and results are taken."""
    recorder = StockRecorder(settings)

    def after_pop_bootstrapped(reqs: list[Any], *_: Any) -> None:
        recorder.arrived(reqs)

    def around_run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.run(lambda: original(scheduler, batch, *args, **kwargs), batch)

    def around_process_result(original: Callable[..., None], scheduler: Any, batch: Any, result: Any) -> None:
        last_chunks = [req for req in batch.reqs if req.inflight_middle_chunks <= 0]
        original(scheduler, batch, result)
        recorder.ended(last_chunks)

    why = "nothing would be known of what SGLang's own scheduler does"
    return [
        Hook(
            target="sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.pop_bootstrapped",
            kind=HookKind.AFTER,
            function=after_pop_bootstrapped,
            why=why,
        ),
        Hook(
            target="sglang.srt.managers.scheduler.Scheduler.run_batch",
            kind=HookKind.AROUND,
            function=around_run_batch,
            why=why,
        ),
        Hook(
            target=f"{MIXIN}.process_batch_result_disagg_prefill",
            kind=HookKind.AROUND,
            function=around_process_result,
            why=why,
        ),
    ]
