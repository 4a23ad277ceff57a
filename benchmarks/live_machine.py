"""A live cluster's machine for the simulator, measured on it: its forward passes where they really run, what lies
between two of them, and the way to the worker and back.

Nothing here looks at a load that is to be predicted. Bursts, single requests, and another window of the trace at one
load are played to one worker, and the events that it records itself are what is fitted.

- **Forwards.** The times that the worker's own tasks ran, as a cost model (``core.cost_fit``). On two cores that share
  caches and memory, with every other process busy beside it, they are longer than ``flowprefill profile`` finds them
  when the machine is otherwise idle.
- **Gaps.** From the end of a forward to the start of the next whose requests were there by then: taking results,
  handing KV over, new messages, the round. So much for each forward and for each request and token of the one that
  ended (non-negative least squares).
- **Preemptions.** From the stop of a forward to the start of what it was stopped for: the decision, and SGLang making
  the batch. The mean.
- **The host core**, which does all else: what a single request's way takes before the worker has it and after its
  prefill, but no more than the CPU time that all other processes use for a request. The rest of the way is a constant.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import psutil
from msgspec.structs import replace as replace_struct
from scipy.optimize import nnls

from flowprefill_sglang.bench.client import RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import Objective, unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.cluster.side_by_side import LiveWorkers
from flowprefill_sglang.core.cost_fit import Sample, errors, fit
from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.observe.events import (
    Event,
    RequestArrived,
    RequestEnded,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.trace import TraceRequest

ENDPOINT = ENDPOINTS["generate"]
BURSTS = {250: 48, 2_000: 16}
"""Lengths of the prompts of two bursts, and how many of them."""
BURST_REPEATS = 3
SINGLES = 7
"""Of each class's median length."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Seconds of the worker's core from the end of a forward to the start of the next: so much, and so much for each
    request and each token of the one that ended."""

    forward_s: float
    request_s: float
    token_s: float

    def added_to(self, cost: CostModel) -> CostModel:
        """The cost of forwards with their gaps."""
        return replace_struct(
            cost,
            base_s=cost.base_s + self.forward_s,
            request_s=cost.request_s + self.request_s,
            short_token_s=cost.short_token_s + self.token_s,
            long_token_s=cost.long_token_s + self.token_s,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One configuration's machine."""

    forward: CostModel
    """Of forwards alone."""
    gap: Gap
    preempt_s: float
    """As ``Machine`` has it."""
    host_before_s: float
    host_after_s: float
    way_s: float

    def against(self, played: Played) -> dict[str, float]:
        """What lay where on the worker's core, over what this machine says of the very same forwards: where an error of
        the simulation comes from. Gaps count only where the next forward could have gone on at once."""
        forwards = played.forwards()
        gaps = list(played.gaps(self.host_before_s))
        preemptions_s = list(played.preemptions_s())
        modelled_s = sum(
            self.gap.forward_s + self.gap.request_s * len(ended.rids) + self.gap.token_s * ended.new_tokens
            for ended, _ in gaps
        )
        return {
            "forwards_over_modelled": round(
                sum(one.seconds for one in forwards) / sum(self.forward.seconds(one.extents) for one in forwards), 4
            ),
            "gaps": len(gaps),
            "gaps_over_modelled": round(sum(seconds for _, seconds in gaps) / modelled_s, 4) if modelled_s else 0.0,
            "preemptions": len(preemptions_s),
            "preemption_mean_ms": round(1e3 * fmean(preemptions_s), 3) if preemptions_s else 0.0,
        }

    def machine(self, layers: int) -> Machine:
        """A prefill worker of it."""
        return Machine(
            name="this one",
            cost=self.gap.added_to(self.forward),
            layers=layers,
            operators=LLAMA_LIKE,
            handoff_base_s=self.way_s,
            preempt_s=self.preempt_s,
            host_before_s=self.host_before_s,
            host_after_s=self.host_after_s,
        )


@dataclass(frozen=True, kw_only=True)
class Played:
    """What was sent to a worker at once, and what became of it. Times are monotonic seconds of this host."""

    records: list[RequestRecord]
    """Their times count from ``began_at``."""
    began_at: float
    took_s: float
    events: list[Event]
    scheduler_cpu_s: float
    host_cpu_s: float
    """Of all processes but the scheduler, this one included."""

    @property
    def arrivals(self) -> dict[str, RequestArrived]:
        """By rid."""
        return {event.rid: event for event in self.events if isinstance(event, RequestArrived)}

    def forwards(self) -> list[Sample]:
        """Each task, of whole prompts, and how long it ran by the worker's own clock."""
        arrivals = self.arrivals
        return [
            Sample(tuple(Extent(arrivals[rid].tokens) for rid in event.rids), event.executed_s)
            for event in self.events
            if isinstance(event, TaskFinished)
        ]

    def gaps(self, before_s: float) -> Iterator[tuple[TaskFinished, float]]:
        """Each end of a task after which another went on that could have gone on before, and the seconds between.

        ``before_s``: until the worker can know of a single request. Twice that after its receipt it surely does; stock
        SGLang takes requests in between two forwards, so there the event alone does not tell.
        """
        arrivals = self.arrivals
        ended: TaskFinished | None = None
        for event in self.events:
            if isinstance(event, TaskFinished):
                ended = event
            elif isinstance(event, TaskStarted | TaskResumed):
                known_at = (min(arrivals[rid].at, arrivals[rid].received_at + 2 * before_s) for rid in event.rids)
                is_ready = ended is not None and (isinstance(event, TaskResumed) or max(known_at) < ended.at)
                if ended is not None and is_ready:
                    yield ended, event.at - ended.at
                ended = None

    def preemptions_s(self) -> Iterator[float]:
        """For each stop of a task, the seconds until another runs."""
        stopped_at: float | None = None
        for event in self.events:
            if isinstance(event, TaskPreempted):
                stopped_at = event.at
            elif isinstance(event, TaskStarted | TaskResumed) and stopped_at is not None:
                yield event.at - stopped_at
                stopped_at = None


class Cluster:
    """The live workers, and what their processes have used."""

    def __init__(self, live: LiveWorkers) -> None:
        self._live = live

    def host_cpu_s(self, name: str) -> float:
        """CPU seconds so far of what serves this configuration's requests, but for its scheduler: router, HTTP,
        decode instance, client."""
        scheduler_pid = self._live[name].scheduler_pid
        parents = [psutil.Process(self._live.pid(one)) for one in (f"router-{name}", f"prefill-{name}", "decode")]
        below = [process for parent in parents for process in parent.children(recursive=True)]
        every = {process.pid: process for process in (*parents, *below, psutil.Process())}
        times = [process.cpu_times() for pid, process in every.items() if pid != scheduler_pid]
        return float(sum(one.user + one.system for one in times))

    async def play(
        self, name: str, rows: Sequence[TraceRequest], objectives: Mapping[str, Objective], seed: int
    ) -> Played:
        """Send the rows at their times. Raises RuntimeError when a request failed."""
        worker = self._live[name]
        run_id = f"validation-{uuid.uuid4().hex[:12]}"
        plan = plan_requests(rows, run_id=run_id, seed=seed, endpoint=ENDPOINT, model="", objectives=objectives)
        host_s, scheduler_s, began_at = self.host_cpu_s(name), worker.scheduler_cpu_s(), time.monotonic()
        records = await replay(worker.url, plan, timeout_s=300, clock=time.monotonic, started_at=began_at)
        took_s = time.monotonic() - began_at
        failed = [record.error for record in records if record.error is not None]
        if failed:
            raise RuntimeError(f"{name}: {len(failed)} requests failed: {failed[0]}")
        await worker.drained()
        host_s, scheduler_s = self.host_cpu_s(name) - host_s, worker.scheduler_cpu_s() - scheduler_s
        events = (await worker.timeline(time.monotonic() - began_at + 0.1)).events
        return Played(
            records=list(records),
            began_at=began_at,
            took_s=took_s,
            events=[event for event in events if event.at >= began_at],
            scheduler_cpu_s=scheduler_s,
            host_cpu_s=host_s,
        )


async def measure_machine(
    cluster: Cluster,
    name: str,
    *,
    profiled: CostModel,
    lengths: Sequence[int],
    window: Sequence[TraceRequest],
    busy_share: float,
    objectives: Mapping[str, Objective],
    seed: int,
) -> tuple[Measured, dict[str, float]]:
    """One configuration's machine, and figures that it was made of.

    ``profiled``: forwards on an idle machine, to compare with. ``lengths``: of the single requests. ``window`` is
    played so that forwards one by one fill ``busy_share`` of the time.
    """
    relaxed = unscaled_objectives(100)
    singles = [
        await cluster.play(name, [_row(tokens)], relaxed, seed + 10_000 + 100 * repeat + place)
        for repeat in range(SINGLES + 1)
        for place, tokens in enumerate(lengths)
    ][len(lengths) :]  # the first round warms up
    before_s, after_s = median(map(_before_s, singles)), median(map(_after_s, singles))
    bursts = [
        await cluster.play(name, [_row(tokens)] * count, relaxed, seed + 1_000 * repeat + tokens)
        for repeat in range(BURST_REPEATS)
        for tokens, count in BURSTS.items()
    ]
    alone_s = fit([one for played in (*bursts, *singles) for one in played.forwards()])
    factor = sum(alone_s.seconds((Extent(row.input_tokens),)) for row in window) / (busy_share * window[-1].arrival_s)
    busy = await cluster.play(name, [_at(row, row.arrival_s * factor) for row in window], objectives, seed + 20_000)
    forwards = [sample for played in (*bursts, *singles, busy) for sample in played.forwards()]
    forward, gap = fit(forwards), fit_gap(busy, before_s)
    whole = gap.added_to(forward)
    left_s = max(
        0.0, median((one.records[0].ttft_s or 0.0) - whole.seconds(one.forwards()[0].extents) for one in singles)
    )
    host_s = min(left_s, busy.host_cpu_s / len(busy.records))
    share = before_s / (before_s + after_s)
    found = Measured(
        forward=forward,
        gap=gap,
        preempt_s=fit_preemption(busy),
        host_before_s=host_s * share,
        host_after_s=host_s * (1 - share),
        way_s=left_s - host_s,
    )
    return found, {
        "window_load": sum(whole.seconds((Extent(row.input_tokens),)) for row in window)
        / (window[-1].arrival_s * factor),
        "forward_error_median": median(errors(forward, busy.forwards())),
        "forward_over_profiled": sum(one.seconds for one in busy.forwards())
        / sum(profiled.seconds(one.extents) for one in busy.forwards()),
        "preemptions": float(sum(1 for _ in busy.preemptions_s())),
        "single_before_ms": 1e3 * before_s,
        "single_after_ms": 1e3 * after_s,
        "host_cpu_ms": 1e3 * busy.host_cpu_s / len(busy.records),
    }


def fit_gap(played: Played, before_s: float) -> Gap:
    """What lies between two forwards. A gap that something stretched counts three times the usual at most."""
    found = list(played.gaps(before_s))
    limit_s = 3 * median(seconds for _, seconds in found)
    rows = np.array([[1.0, len(end.rids), end.new_tokens] for end, _ in found])
    forward_s, request_s, token_s = nnls(rows, np.array([min(seconds, limit_s) for _, seconds in found]))[0]
    return Gap(forward_s=float(forward_s), request_s=float(request_s), token_s=float(token_s))


def fit_preemption(played: Played) -> float:
    """What a preemption costs beside the stop, stretched ones cut as gaps are; 0 where nothing was preempted, as in
    stock SGLang, which cannot."""
    found = list(played.preemptions_s())
    if not found:
        return 0.0
    limit_s = 3 * median(found)
    return fmean(min(seconds, limit_s) for seconds in found)


def _at(row: TraceRequest, at_s: float) -> TraceRequest:
    return replace(row, arrival_s=at_s)


def _row(tokens: int) -> TraceRequest:
    return TraceRequest(arrival_s=0, input_tokens=tokens, output_tokens=1, class_name="file")


def _before_s(alone: Played) -> float:
    """From sending a single request until the worker's scheduler could start it."""
    (arrived,) = alone.arrivals.values()
    return arrived.at - alone.began_at - alone.records[0].sent_at


def _after_s(alone: Played) -> float:
    """From the end of its prefill to its first token at the client."""
    ended_at = next(event.at for event in alone.events if isinstance(event, RequestEnded))
    return alone.began_at + (alone.records[0].first_token_at or 0.0) - ended_at
