"""One load, played until every request is decided: answered, or so late that it has missed its objective."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowprefill_sglang.bench.client import PlannedRequest, RequestRecord, replay
from flowprefill_sglang.bench.objectives import Objective
from flowprefill_sglang.bench.report import LATE_MS, late_refusal, percentile
from flowprefill_sglang.errors import OutOfCapacity

HOPELESS = 0.75
"""A search for 90% cuts a load short once its attainment cannot be above this."""
LATE_ATTEMPTS = 3
"""A load that the client could not offer in time is offered again, since other work on a machine comes and goes."""
_ON_THEIR_WAY_S = 0.5
"""For answers that were in time and are still on the wire."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered:
    """What became of a load."""

    plan: Sequence[PlannedRequest]
    records: Sequence[RequestRecord]
    """Of requests that ended; the others were past their objective, or the load was cut short."""
    objectives: Mapping[str, Objective]
    wall_s: float
    is_cut_short: bool

    @property
    def attained(self) -> int:
        """Requests that met their objective; of a load that was cut short, the most that still could have."""
        met = sum(self.objectives[r.class_name].is_met_by(r) for r in self.records)
        return len(self.plan) - (len(self.records) - met) if self.is_cut_short else met

    @property
    def late_p99_ms(self) -> float:
        """How late the client sent 1% of the requests, or more."""
        return percentile([1_000 * r.late_s for r in self.records], 99)

    @property
    def is_client_late(self) -> bool:
        """Whether the load was not the one asked for."""
        return self.late_p99_ms > LATE_MS

    def to_row(self) -> dict[str, Any]:
        """A JSON object, without the records."""
        by_class = Counter(planned.class_name for planned in self.plan)
        met = [r for r in self.records if self.objectives[r.class_name].is_met_by(r)]
        met_by_class = Counter(r.class_name for r in met)
        ttft_ms = {name: [1_000 * (r.ttft_s or 0) for r in met if r.class_name == name] for name in by_class}
        return {
            "requests": len(self.plan),
            "attained": self.attained,
            "cut_short": self.is_cut_short,
            "errors": dict(Counter(r.error for r in self.records if r.error)),
            "undecided": len(self.plan) - len(self.records),
            "wall_s": round(self.wall_s, 2),
            "client_late_p99_ms": round(self.late_p99_ms, 2) if self.records else None,
            "client_late_max_ms": round(max((1_000 * r.late_s for r in self.records), default=0.0), 2),
            "classes": {
                name: {
                    "requests": count,
                    "attained": met_by_class[name],
                    "met_ttft_p50_ms": round(percentile(ttft_ms[name], 50), 1) if ttft_ms[name] else None,
                }
                for name, count in by_class.items()
            },
        }


async def offer(
    url: str,
    plan: Sequence[PlannedRequest],
    objectives: Mapping[str, Objective],
    *,
    hopeless: float | None = None,
    patience: float = 1.0,
    headers: Mapping[str, str] | None = None,
    on_answer: Callable[[RequestRecord], None] | None = None,
) -> Offered:
    """Play a plan until all is decided; who is still under way then has missed and is aborted.

    Not before: a request that is late is part of the load. ``patience``: how many times its objective a request is
    waited for, before it counts as missed. ``hopeless`` ends the load as soon as attainment cannot be above it.
    """
    records: dict[str, RequestRecord] = {}
    is_decided = asyncio.Event()
    most_misses = len(plan) if hopeless is None else (1 - hopeless) * len(plan)
    missed = 0

    def on_record(record: RequestRecord) -> None:
        nonlocal missed
        records[record.rid] = record
        if on_answer is not None:
            on_answer(record)
        missed += not objectives[record.class_name].is_met_by(record)
        if len(records) == len(plan) or missed > most_misses:
            is_decided.set()

    began_at = time.perf_counter()
    load = asyncio.create_task(replay(url, plan, on_record=on_record, headers=headers, started_at=began_at))
    last_s = max(planned.at_s + patience * objectives[planned.class_name].slo_ms / 1_000 for planned in plan)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(last_s + _ON_THEIR_WAY_S):
                await is_decided.wait()
    finally:
        wall_s = time.perf_counter() - began_at
        load.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await load
    kept = [records[planned.rid] for planned in plan if planned.rid in records]
    return Offered(plan=plan, records=kept, objectives=objectives, wall_s=wall_s, is_cut_short=missed > most_misses)


async def in_time(offer_once: Callable[[], Awaitable[Offered]], what: str) -> Offered:
    """A load that the client offered in time. Raises OutOfCapacity when it fell behind in every attempt."""
    for _ in range(LATE_ATTEMPTS):
        offered = await offer_once()
        if not offered.is_client_late:
            return offered
    raise OutOfCapacity(late_refusal(offered.late_p99_ms, what))
