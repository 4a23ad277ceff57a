"""From the records of a replay to numbers, a table and JSON. Pure, but for printing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.objectives import Objective

LATE_MS = 50.0
"""A client whose 99th percentile of lateness is above this did not offer the load that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """One class's numbers; ``nan`` where there is nothing to count."""

    name: str
    count: int
    succeeded: int
    slo_ms: float
    attained: int
    """Complete answers whose TTFT met the objective."""
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float

    @property
    def attainment(self) -> float:
        """Part of all its requests, failed ones included, that met the objective."""
        return self.attained / self.count if self.count else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One replay's numbers."""

    classes: tuple[ClassReport, ...]
    wall_s: float
    """From the first request sent to the last answer's end."""
    input_tokens: int
    """Of complete answers, as is ``output_tokens``."""
    output_tokens: int
    late_p99_ms: float
    late_max_ms: float
    errors: tuple[tuple[str, int], ...]
    """Distinct errors, most frequent first."""

    @property
    def requests(self) -> int:
        """All requests of the replay."""
        return sum(c.count for c in self.classes)

    @property
    def succeeded(self) -> int:
        """Complete answers."""
        return sum(c.succeeded for c in self.classes)

    @property
    def attained(self) -> int:
        """Complete answers within their objective."""
        return sum(c.attained for c in self.classes)

    @property
    def attainment(self) -> float:
        """Part of all requests that met their objective; ``nan`` for none."""
        return self.attained / self.requests if self.requests else math.nan

    @property
    def goodput_rps(self) -> float:
        """Requests within their objective, per second; ``nan`` without time."""
        return self.attained / self.wall_s if self.wall_s > 0 else math.nan

    @property
    def is_client_late(self) -> bool:
        """Whether the client fell behind its own schedule."""
        return self.late_p99_ms > LATE_MS


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default; ``nan`` for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def pooled(reports: Sequence[Report], summary: Report) -> Report:
    """``summary``, which is over the records of several loads one after another, with the time that these took."""
    return replace(summary, wall_s=sum(report.wall_s for report in reports))


def late_refusal(late_p99_ms: float, what: str) -> str:
    """Why there is no result of ``what``."""
    return (
        f"no result: the load client fell behind {what}: 1% of its requests left over {late_p99_ms:.0f} ms after their "
        f"time (limit {LATE_MS:.0f} ms), so that the load was not the one asked for; lower the rate, or run the client "
        "where nothing else wants the processor"
    )


_NUMBER = re.compile(r"\d+")


def error_kind(error: str) -> str:
    """What errors of one cause have in common: the HTTP status, or the words before details and numbers."""
    head = error.split(":")[0].split(" (")[0]
    return head if head.startswith("HTTP ") else _NUMBER.sub("N", head)


def errors_by_kind(report: Report) -> list[tuple[str, int, str]]:
    """Kind, number of requests, and the most frequent error of the kind; the most frequent kind first."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for error, count in report.errors:
        counts[error_kind(error)] += count
        examples.setdefault(error_kind(error), error)
    return [(kind, count, examples[kind]) for kind, count in counts.most_common()]


def summarize(records: Sequence[RequestRecord], objectives: Mapping[str, Objective]) -> Report:
    """Count and measure. TTFT percentiles are over complete answers; a failed request counts against attainment.

    Every class that occurs needs an objective: KeyError otherwise.
    """
    names = [name for name in objectives if any(r.class_name == name for r in records)]
    names += sorted({r.class_name for r in records} - set(names))
    complete = [r for r in records if r.error is None]
    late_ms = [1_000 * r.late_s for r in records]
    wall_s = max((r.finished_at for r in records), default=0.0) - min((r.sent_at for r in records), default=0.0)
    return Report(
        classes=tuple(
            _class_report(name, objectives[name].slo_ms, [r for r in records if r.class_name == name]) for name in names
        ),
        wall_s=wall_s,
        input_tokens=sum(r.input_tokens for r in complete),
        output_tokens=sum(r.output_tokens for r in complete),
        late_p99_ms=percentile(late_ms, 99),
        late_max_ms=max(late_ms, default=math.nan),
        errors=tuple(Counter(r.error for r in records if r.error is not None).most_common()),
    )


def _class_report(name: str, slo_ms: float, records: Sequence[RequestRecord]) -> ClassReport:
    ttfts_ms = [1_000 * r.ttft_s for r in records if r.error is None and r.ttft_s is not None]
    return ClassReport(
        name=name,
        count=len(records),
        succeeded=sum(r.error is None for r in records),
        slo_ms=slo_ms,
        attained=sum(t <= slo_ms for t in ttfts_ms),
        ttft_p50_ms=percentile(ttfts_ms, 50),
        ttft_p90_ms=percentile(ttfts_ms, 90),
        ttft_p99_ms=percentile(ttfts_ms, 99),
    )


def to_document(report: Report, objectives: Mapping[str, Objective]) -> dict[str, Any]:
    """The JSON document; its keys are stable. Numbers that do not exist are null."""
    per_s = 1 / report.wall_s if report.wall_s > 0 else math.nan
    return {
        "requests": report.requests,
        "succeeded": report.succeeded,
        "wall_s": _number(report.wall_s, 3),
        "attainment": _number(report.attainment, 4),
        "goodput_rps": _number(report.goodput_rps, 3),
        "input_tokens_per_s": _number(report.input_tokens * per_s, 1),
        "output_tokens_per_s": _number(report.output_tokens * per_s, 1),
        "client_late": report.is_client_late,
        "client_late_p99_ms": _number(report.late_p99_ms, 2),
        "client_late_max_ms": _number(report.late_max_ms, 2),
        "errors": [{"error": error, "count": count} for error, count in report.errors],
        "errors_by_kind": {kind: count for kind, count, _ in errors_by_kind(report)},
        "classes": {
            c.name: {
                "count": c.count,
                "succeeded": c.succeeded,
                "slo_ms": _number(c.slo_ms, 2),
                "slo_factor": _number(objectives[c.name].factor, 4),
                "isolated_ttft_ms": _number(objectives[c.name].isolated_ttft_ms, 2),
                "median_input_tokens": objectives[c.name].median_input_tokens,
                "ttft_p50_ms": _number(c.ttft_p50_ms, 2),
                "ttft_p90_ms": _number(c.ttft_p90_ms, 2),
                "ttft_p99_ms": _number(c.ttft_p99_ms, 2),
                "attainment": _number(c.attainment, 4),
            }
            for c in report.classes
        },
    }


def to_table(report: Report, objectives: Mapping[str, Objective]) -> Table:
    """The same for people; what does not fit a row of a class is in the caption."""
    table = Table(title="Time to first token")
    for heading in ("class", "sent", "ok", "objective", "p50", "p90", "p99", "attained"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for c in report.classes:
        times = [_milliseconds(x) for x in (c.slo_ms, c.ttft_p50_ms, c.ttft_p90_ms, c.ttft_p99_ms)]
        table.add_row(c.name, str(c.count), str(c.succeeded), *times, f"{100 * c.attainment:.0f}%")
    document = to_document(report, objectives)
    table.caption = (
        f"{report.succeeded} of {report.requests} requests succeeded in {report.wall_s:.1f} s; "
        f"{document['input_tokens_per_s']} prompt tokens/s, {document['output_tokens_per_s']} answer tokens/s; "
        f"{document['goodput_rps']} requests/s within their objective"
    )
    return table


def _milliseconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f} ms"


def _number(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
