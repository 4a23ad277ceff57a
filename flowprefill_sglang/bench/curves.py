"""The paper's two figures as numbers: attainment against the tightness of objectives, and against the rate. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.objectives import Objective

SLO_SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The paper's range: every objective times the same factor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Attainment at each ``x``."""

    name: str
    """A class, ``all``, or whatever else the curve is of."""
    x: tuple[float, ...]
    attainment: tuple[float, ...]


def slo_scale_curves(
    records: Sequence[RequestRecord],
    objectives: Mapping[str, Objective],
    scales: Sequence[float] = SLO_SCALES,
    requests: Mapping[str, int] | None = None,
) -> list[Curve]:
    """What attainment of these same answers would be, had the objectives been looser or tighter: all, then each class.

    The server scheduled by the objectives that it was told, those of scale 1. ``requests``: how many were sent by
    class, where some have no record because they were given up; they are missed at every scale.
    """
    sent = dict(requests) if requests is not None else {}
    if requests is None:
        for record in records:
            sent[record.class_name] = sent.get(record.class_name, 0) + 1
    names = [name for name in objectives if name in sent]
    met = {name: [0] * len(scales) for name in names}
    for record in records:
        if record.error is not None or record.ttft_s is None:
            continue
        ratio = 1_000 * record.ttft_s / objectives[record.class_name].slo_ms
        for place, scale in enumerate(scales):
            met[record.class_name][place] += ratio <= scale
    total = sum(sent[name] for name in names)
    everything = tuple(sum(met[name][place] for name in names) / total for place in range(len(scales)))
    return [
        Curve(name="all", x=tuple(scales), attainment=everything),
        *(Curve(name=n, x=tuple(scales), attainment=tuple(c / sent[n] for c in met[n])) for n in names),
    ]


def rate_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """From loads at several rates (``Offered.to_row`` with ``rate_rps``): all, then each class. Equal rates are pooled.

    Loads that were cut short only bound attainment and are left out.
    """
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["cut_short"]:
            by_rate.setdefault(row["rate_rps"], []).append(row)
    rates = sorted(by_rate)
    if not rates:
        return []
    names = list(by_rate[rates[0]][0]["classes"])

    def share(rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(row["attained"] for row in rows) / sum(row["requests"] for row in rows))

    def curve(name: str, pick: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
        return Curve(name=name, x=tuple(rates), attainment=tuple(share(rows) for rows in pick))

    return [
        curve("all", [by_rate[rate] for rate in rates]),
        *(curve(name, [[row["classes"][name] for row in by_rate[rate]] for rate in rates]) for name in names),
    ]


def to_document(curves: Sequence[Curve]) -> dict[str, list[list[float]]]:
    """``{name: [[x, attainment], ...]}``."""
    return {c.name: [[round(x, 4), round(y, 4)] for x, y in zip(c.x, c.attainment, strict=True)] for c in curves}
