"""What a live cluster on two cores costs beside its forward passes, measured on it: for the simulator's machine.

Nothing here looks at a load that is to be predicted. Three things are played to one worker at a time: bursts, single
requests, and a window of a trace at a low load.

- **The worker's core.** CPU seconds of the scheduler process, all threads (messages, batches, results, the handoff of
  the KV), less what the cost model says its forward passes take, are fitted as so much for each forward, each request
  and each token (non-negative least squares over the bursts and the window).
- **The host core**, which does all else. CPU seconds of every other process for a request of the window, less what they
  use idle. How much of it lies before the worker and how much after the prefill is split as a single request's way is;
  what a single request does not wait for comes after its first token.
- **The way** that is left: of a single request, all of its TTFT but the above.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import psutil
from msgspec.structs import replace as replace_struct
from scipy.optimize import nnls

from flowprefill_sglang.bench.client import RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import Objective, unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.cluster.side_by_side import LiveWorker, LiveWorkers
from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.observe.events import Event, RequestArrived, RequestEnded, TaskFinished
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.trace import TraceRequest

ENDPOINT = ENDPOINTS["generate"]
BURSTS = {250: 48, 2_000: 16}
"""Lengths of the prompts of two bursts, and how many of them."""
BURST_REPEATS = 3
SINGLES = 7
"""Of each class's median length."""
IDLE_S = 3.0


def with_overheads(cost: CostModel, forward_s: float, request_s: float, token_s: float) -> CostModel:
    """The cost of forward passes with so much more for each, each request and each token."""
    return replace_struct(
        cost,
        base_s=cost.base_s + forward_s,
        request_s=cost.request_s + request_s,
        short_token_s=cost.short_token_s + token_s,
        long_token_s=cost.long_token_s + token_s,
    )


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Of one configuration, in seconds."""

    forward_s: float
    """Of the worker's core for each forward pass, beside it; likewise for each request and each token."""
    request_s: float
    token_s: float
    host_before_s: float
    host_after_s: float
    host_rest_s: float
    way_s: float

    def machine(self, cost: CostModel, layers: int) -> Machine:
        """A prefill worker whose forwards cost so much by themselves, with all that belongs to it."""
        return Machine(
            name="this one",
            cost=with_overheads(cost, self.forward_s, self.request_s, self.token_s),
            layers=layers,
            operators=LLAMA_LIKE,
            handoff_base_s=self.way_s,
            host_before_s=self.host_before_s,
            host_after_s=self.host_after_s,
            host_rest_s=self.host_rest_s,
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
    def forwards(self) -> list[list[Extent]]:
        """Of whole prompts."""
        tokens = {event.rid: event.tokens for event in self.events if isinstance(event, RequestArrived)}
        return [[Extent(tokens[rid]) for rid in event.rids] for event in self.events if isinstance(event, TaskFinished)]

    def executed_s(self) -> float:
        """Time that the forward passes ran, by the worker's own clock."""
        return sum(event.executed_s for event in self.events if isinstance(event, TaskFinished))


class Cluster:
    """The live workers, and what their processes have used."""

    def __init__(self, live: LiveWorkers) -> None:
        self._live = live

    def worker(self, name: str) -> LiveWorker:
        """Raises KeyError."""
        return self._live[name]

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


async def measure_overheads(
    cluster: Cluster,
    name: str,
    *,
    cost: CostModel,
    lengths: Sequence[int],
    window: Sequence[TraceRequest],
    objectives: Mapping[str, Objective],
    seed: int,
) -> tuple[Overheads, dict[str, float]]:
    """The overheads of one configuration, and the figures they were made of in milliseconds.

    ``lengths``: of the single requests. ``window``: a part of a trace at a low load.
    """
    relaxed = unscaled_objectives(100)
    bursts = [
        await cluster.play(name, [_row(tokens)] * count, relaxed, seed + 1_000 * repeat + tokens)
        for repeat in range(BURST_REPEATS)
        for tokens, count in BURSTS.items()
    ]
    alone = [
        await cluster.play(name, [_row(tokens)], relaxed, seed + 10_000 + 100 * repeat + place)
        for repeat in range(SINGLES + 1)
        for place, tokens in enumerate(lengths)
    ][len(lengths) :]  # the first round warms up
    idle_before_s = cluster.host_cpu_s(name)
    await asyncio.sleep(IDLE_S)
    idle_share = (cluster.host_cpu_s(name) - idle_before_s) / IDLE_S
    low = await cluster.play(name, window, objectives, seed + 20_000)
    forward_s, request_s, token_s = fit_core([*bursts, low], cost)
    whole = with_overheads(cost, forward_s, request_s, token_s)
    before_s, after_s = median(map(_before_s, alone)), median(map(_after_s, alone))
    left_s = max(0.0, median((one.records[0].ttft_s or 0.0) - whole.seconds([Extent(_tokens(one))]) for one in alone))
    host_s = max(0.0, low.host_cpu_s - idle_share * low.took_s) / len(low.records)
    awaited_s = min(host_s, left_s)
    share = before_s / (before_s + after_s)
    found = Overheads(
        forward_s=forward_s,
        request_s=request_s,
        token_s=token_s,
        host_before_s=awaited_s * share,
        host_after_s=awaited_s * (1 - share),
        host_rest_s=host_s - awaited_s,
        way_s=left_s - awaited_s,
    )
    return found, {
        "single_ttft_ms": 1e3 * fmean(one.records[0].ttft_s or 0.0 for one in alone),
        "single_before_ms": 1e3 * before_s,
        "single_after_ms": 1e3 * after_s,
        "low_scheduler_cpu_ms": 1e3 * low.scheduler_cpu_s / len(low.records),
        "low_forward_ms": 1e3 * low.executed_s() / len(low.records),
        "low_predicted_ms": 1e3 * sum(map(cost.seconds, low.forwards)) / len(low.records),
        "low_host_cpu_ms": 1e3 * low.host_cpu_s / len(low.records),
        "idle_host_share": idle_share,
    }


def fit_core(played: Sequence[Played], cost: CostModel) -> tuple[float, float, float]:
    """Seconds of the worker's core for a forward, a request and a token, beside the forward passes themselves."""
    rows, beside_s = [], []
    for one in played:
        forwards = one.forwards
        requests = sum(map(len, forwards))
        tokens = sum(extent.new_tokens for extents in forwards for extent in extents)
        rows.append([len(forwards) / requests, 1.0, tokens / requests])
        beside_s.append((one.scheduler_cpu_s - sum(map(cost.seconds, forwards))) / requests)
    forward_s, request_s, token_s = nnls(np.array(rows), np.array(beside_s))[0]
    return float(forward_s), float(request_s), float(token_s)


def _row(tokens: int) -> TraceRequest:
    return TraceRequest(arrival_s=0, input_tokens=tokens, output_tokens=1, class_name="file")


def _tokens(alone: Played) -> int:
    return next(event.tokens for event in alone.events if isinstance(event, RequestArrived))


def _before_s(alone: Played) -> float:
    """From sending a single request until the worker's scheduler could start it."""
    arrived_at = next(event.at for event in alone.events if isinstance(event, RequestArrived))
    return arrived_at - alone.began_at - alone.records[0].sent_at


def _after_s(alone: Played) -> float:
    """From the end of its prefill to its first token at the client."""
    ended_at = next(event.at for event in alone.events if isinstance(event, RequestEnded))
    return alone.began_at + (alone.records[0].first_token_at or 0.0) - ended_at
