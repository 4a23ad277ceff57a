"""The simulation's table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]], bounds: Sequence[Mapping[str, float]], title: str) -> Table:
    """One line for each policy and load. ``rows``: by policy, as ``result_row`` makes them; ``bounds``: by load."""
    shown = Table("load", "policy", "attainment", title=title, box=box.SIMPLE, pad_edge=False)
    if bounds:
        shown.add_column("of the bound")
    classes = list(dict.fromkeys(name for runs in rows.values() for row in runs for name in row["classes"]))
    for column in ("goodput rps", "mean TTFT", "p99 blocked", "preempted", "busy", *classes):
        shown.add_column(column)
    for column in shown.columns:
        column.justify = "right"
    shown.columns[1].justify, shown.columns[1].no_wrap = "left", True
    most = {one["load"]: one["attainment"] for one in bounds}
    alone = {one["load"]: (one["surely"], one["without_batches"]) for one in bounds if "surely" in one}
    for load in dict.fromkeys(row["load"] for runs in rows.values() for row in runs):
        for name, runs in rows.items():
            for row in (one for one in runs if one["load"] == load):
                shown.add_row(*_cells(name, row, most.get(load), bool(bounds), classes))
        if load in most:
            shown.add_row(f"{load:g}", "(bound)", f"{most[load]:.1%}", style="dim")
        if load in alone:
            figures = dict.fromkeys(f"{one:.1%}" for one in alone[load])  # one, where both are the same
            shown.add_row(f"{load:g}", "(best without batches)", " to ".join(figures), style="dim")
        shown.add_section()
    return shown


def _cells(name: str, row: Mapping[str, Any], most: float | None, has_bound: bool, classes: Sequence[str]) -> list[str]:
    blocked_ms = row["blocking_p99_ms"]
    of_bound = [f"{row['attainment'] / most:.1%}" if most else "–"] if has_bound else []
    return [
        f"{row['load']:g}",
        name,
        f"{row['attainment']:.1%}",
        *of_bound,
        f"{row['goodput_rps']:.3g}",
        f"{row['mean_ttft_s']:.3g} s",
        "–" if blocked_ms is None else f"{blocked_ms:.3g} ms",
        f"{row['preemptions']:,}",
        f"{row['busy_share']:.0%}",
        *(f"{row['classes'][one]['attainment']:.1%}" if one in row["classes"] else "–" for one in classes),
    ]
