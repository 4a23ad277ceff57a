"""One workload under several scheduling configurations and loads, beside the bound; results as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.prefill_worker.scheduler import Request
from flowprefill_sglang.sim.arrivals import Measure, Workload, at_load, measure, windows
from flowprefill_sglang.sim.bound import Charges, bound
from flowprefill_sglang.sim.configuration import STOCK_BATCH_TOKENS, Configuration
from flowprefill_sglang.sim.engine import ClusterSettings, run
from flowprefill_sglang.sim.hindsight import best_found
from flowprefill_sglang.sim.intervals import Intervals
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.sim.tally import ClassTally, Tally
from flowprefill_sglang.sim.whole_jobs import Bracket, bracket
from flowprefill_sglang.sim.workers import WorkerSettings

_FOR_EVER_S: Final = 1e9
_APART: Final = 2.5
"""Longest objectives between two requests that are tried at once: what one of them changes has passed by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A workload on a cluster. What differs between runs, configuration and load, is given to ``simulate``."""

    workload: Workload
    machine: Machine
    objectives_s: Mapping[str, float]
    """TTFT objective of each class."""
    workers: int = 1
    routers: int = 1
    dispatch: str = "least_work"
    aging: AgingLimits = field(default_factory=AgingLimits)
    batching: BatchLimits = field(default_factory=BatchLimits)
    is_batching: bool = True
    max_tasks: int = 64
    switch_s: float = 0.0
    error: float = 0.0
    seed: int = 0

    def measure(self) -> Measure:
        """The workload's size on this machine, which loads are relative to."""
        return measure(self.workload, self.machine)

    def simulate(self, configuration: Configuration, interval_factor: float) -> Tally:
        """One run."""
        return run(at_load(self.workload, interval_factor), self.objectives_s, self._cluster(configuration))

    def _cluster(self, configuration: Configuration) -> ClusterSettings:
        worker = WorkerSettings(
            machine=self.machine,
            configuration=configuration,
            aging=self.aging,
            batching=self._batching(configuration),
            is_batching=self.is_batching,
            max_tasks=self.max_tasks,
            switch_s=self.switch_s,
            error=self.error,
        )
        return ClusterSettings(
            worker=worker, workers=self.workers, routers=self.routers, dispatch=self.dispatch, seed=self.seed
        )

    def bound(
        self,
        configurations: Sequence[Configuration],
        interval_factor: float,
        window: int,
        whole_s: float | None = None,
    ) -> float:
        """The most that any schedule could attain that makes forwards like these configurations'.

        ``whole_s``: as ``sim.bound.bound`` has it.
        """
        charges = Charges(
            machine=self.machine,
            batch_tokens=self.batch_tokens(configurations),
            is_chunked=any(one.chunk_tokens is not None for one in configurations),
        )
        parts = windows(at_load(self.workload, interval_factor), window)
        return bound(parts, self.objectives_s, charges, self.workers, whole_s=whole_s)

    def without_batches(self, interval_factor: float, whole_s: float) -> Bracket:
        """Around the requests that one worker can have in time that knows the future and makes no batches. The
        workload is one window; ``whole_s``: seconds to spend on it."""
        charges = Charges(machine=self.machine, batch_tokens=None)
        rows = list(at_load(self.workload, interval_factor))
        return bracket(Intervals(charges.jobs(rows, self.objectives_s)), whole_s)

    def with_hindsight(
        self, configuration: Configuration, interval_factor: float, starts: Iterable[set[int]], rounds: int
    ) -> int:
        """Requests in time in the best run found of this configuration where some are left out (``sim.hindsight``).

        Nothing ages, and a batch may spend all of an objective: the future holds no surprise.
        """
        rows = list(at_load(self.workload, interval_factor))
        never = AgingLimits(max_wait_s=_FOR_EVER_S, max_suspend_s=_FOR_EVER_S)
        fearless = replace(self, aging=never, batching=replace(self.batching, alpha=0.0))
        settings = fearless._cluster(configuration)

        def play(chosen: set[int]) -> set[int]:
            numbers, in_time = sorted(chosen), set()

            def ended(request: Request, at: float) -> None:
                if at <= request.deadline_at:
                    in_time.add(numbers[int(request.rid)])

            run((rows[number] for number in numbers), self.objectives_s, settings, ended)
            return in_time

        found = best_found(
            play,
            [row.arrival_s for row in rows],
            sorted(range(len(rows)), key=lambda number: rows[number].input_tokens),
            starts,
            rounds=rounds,
            apart_s=_APART * max(self.objectives_s.values()),
            seed=self.seed,
        )
        return len(found)

    def batch_tokens(self, configurations: Sequence[Configuration]) -> int | None:
        """The most tokens of a forward of several requests under any of them; None when none batches."""
        if not self.is_batching:
            return None
        return max(
            one.chunk_tokens or STOCK_BATCH_TOKENS if one.is_stock else self._batching(one).max_new_tokens
            for one in configurations
        )

    def _batching(self, configuration: Configuration) -> BatchLimits:
        """A batch is no larger than a chunk, which is all that a forward computes."""
        limits = self.batching
        if configuration.chunk_tokens is None or configuration.chunk_tokens >= limits.max_new_tokens:
            return limits
        return replace(limits, max_new_tokens=configuration.chunk_tokens)


def result_row(load: float, tally: Tally, workers: int) -> dict[str, Any]:
    """One run as a JSON object."""
    return {
        "load": load,
        "attainment": round(tally.attainment, 6),
        "goodput_rps": round(tally.goodput_rps, 6),
        "requests": tally.arrived,
        "attained": tally.attained,
        "offered_rps": round(tally.arrived / tally.last_arrival_at, 6),
        "mean_ttft_s": round(tally.mean_ttft_s, 6),
        "busy_share": round(tally.busy_s / (workers * tally.last_ended_at), 6),
        "forwards": tally.forwards,
        "preemptions": tally.preemptions,
        "retractions": tally.retractions,
        "rounds": tally.rounds,
        "blocking_p50_ms": _ms(tally.blocking.quantile_s(0.5)),
        "blocking_p99_ms": _ms(tally.blocking.quantile_s(0.99)),
        "classes": {name: _class_row(one) for name, one in tally.classes.items() if one.arrived},
    }


def _class_row(one: ClassTally) -> dict[str, Any]:
    quantiles = {f"ttft_p{round(part * 100)}_ms": _ms(one.ttft.quantile_s(part)) for part in (0.5, 0.9, 0.99)}
    return {
        "count": one.arrived,
        "slo_ms": round(one.slo_s * 1e3, 3),
        **quantiles,
        "mean_ttft_ms": _ms(one.ttft.mean_s),
        "attainment": round(one.attainment, 6),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
