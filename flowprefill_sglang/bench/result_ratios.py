"""Two results of the same load beside each other: ratios with their spread over the repeats. Pure.

A ratio is that of the medians over the repeats. Its spread is the least and most of the ratios of all pairs of a repeat
of A with a repeat of B: no assumption about how repeats are distributed, and wider than an interval that makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from flowprefill_sglang.bench.report import percentile

PERCENTILES = (50, 90, 99)
EVERYTHING = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One quantity of A against B; ``nan`` where one of them has none."""

    a: float
    b: float
    value: float
    """``a / b`` of the medians; for attainment ``a - b``."""
    low: float
    high: float

    def to_document(self) -> dict[str, float | None]:
        """A JSON object; null for what does not exist."""
        values = {"a": self.a, "b": self.b, "value": self.value, "min": self.low, "max": self.high}
        return {key: round(value, 4) if math.isfinite(value) else None for key, value in values.items()}


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Compared]]:
    """``{"all" or class: {"attainment", "goodput_rps", "ttft_p50_ms", ...}}`` of two documents of ``bench``."""
    sides = [_repeats(document) for document in (a, b)]
    names = [EVERYTHING, *(name for name in a["classes"] if name in b["classes"])]
    return {
        name: {
            key: _compared([r[name][key] for r in sides[0]], [r[name][key] for r in sides[1]], key)
            for key in sides[0][0][name]
        }
        for name in names
    }


def compare_max_goodput(a: Mapping[str, Any], b: Mapping[str, Any]) -> Compared | None:
    """Where both results have searched it."""
    found = [document.get("max_goodput") for document in (a, b)]
    if found[0] is None or found[1] is None:
        return None
    rates = [[repeat["rate_rps"] for repeat in one["repeats"]] for one in found if one is not None]
    return _compared(rates[0], rates[1], "max_goodput_rps")


def _repeats(document: Mapping[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Every repeat's quantities by class, and over all classes."""
    found = []
    for number, repeat in enumerate(document["repeats"]):
        records = [r for r in document["records"] if r["repeat"] == number]
        quantities = {EVERYTHING: _quantities(records, repeat["attainment"], repeat["requests"], repeat["wall_s"])}
        for name, numbers in repeat["classes"].items():
            of_class = [r for r in records if r["class_name"] == name]
            quantities[name] = _quantities(of_class, numbers["attainment"], numbers["count"], repeat["wall_s"])
        found.append(quantities)
    return found


def _quantities(records: Sequence[Mapping[str, Any]], attainment: float, count: int, wall_s: float) -> dict[str, float]:
    ttfts_ms = [
        1_000 * (r["first_token_at"] - r["sent_at"])
        for r in records
        if r["error"] is None and r["first_token_at"] is not None
    ]
    quantities = {"attainment": attainment, "goodput_rps": attainment * count / wall_s}
    return quantities | {f"ttft_p{percent}_ms": percentile(ttfts_ms, percent) for percent in PERCENTILES}


def _compared(a: Sequence[float], b: Sequence[float], key: str) -> Compared:
    combine: Callable[[float, float], float] = _difference if key == "attainment" else _ratio
    pairs = [combine(x, y) for x in a for y in b]
    middle = (median(a), median(b))
    return Compared(a=middle[0], b=middle[1], value=combine(*middle), low=min(pairs), high=max(pairs))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _difference(a: float, b: float) -> float:
    return a - b


def comparison_table(compared: Mapping[str, Mapping[str, Compared]], names: tuple[str, str]) -> Table:
    """For people: attainment as a difference in percentage points, everything else as the ratio of A to B."""
    table = Table(
        title=f"A = {names[0]}, B = {names[1]}; goodput and TTFT are A / B",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    headings = ("class", "attained", "A − B", "goodput", *(f"TTFT p{p}" for p in PERCENTILES))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, quantities in compared.items():
        attainment = quantities["attainment"]
        ratios = [quantities[key] for key in ("goodput_rps", *(f"ttft_p{p}_ms" for p in PERCENTILES))]
        table.add_row(
            name,
            f"A {100 * attainment.a:.1f}%\nB {100 * attainment.b:.1f}%",
            _cell(attainment, 100, "+.1f", "\n"),
            *(_cell(ratio, 1, ".2f", "\n") for ratio in ratios),
        )
        if name == EVERYTHING:
            table.add_section()
    return table


def in_words(compared: Compared) -> str:
    """A ratio with its spread."""
    return _cell(compared, 1, ".2f", " ")


def _cell(compared: Compared, factor: float, style: str, separator: str) -> str:
    if math.isnan(compared.value):
        return "–"
    middle, low, high = (format(factor * x, style) for x in (compared.value, compared.low, compared.high))
    return middle if low == high else f"{middle}{separator}({low} to {high})"
