"""Pictures of the kit's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw_all(out: Path) -> list[Path]:
    """A picture beside each result that has one."""
    pictures = []
    for name, draw in (("blocking", _blocking), ("throughput", _throughput), ("kernels", _kernels)):
        source = out / f"{name}.json"
        if not source.exists():
            continue
        document = json.loads(source.read_text())
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        draw(axes, document)
        axes.set_title(f"{name} ({document['device']})")
        target = out / f"{name}.png"
        figure.savefig(target, dpi=120)
        pyplot.close(figure)
        pictures.append(target)
    return pictures


def _blocking(axes: Any, document: dict[str, Any]) -> None:
    rows = [row for row in document["summary"] if "p99_ms" in row]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        axes.plot([row["tokens"] for row in mine], [row["p99_ms"] for row in mine], marker="o", label=way)
    axes.axhline(document["max_blocking_ms"], color="grey", linestyle="--", label="target")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt under way", ylabel="blocking, p99, ms")
    axes.legend()


def _throughput(axes: Any, document: dict[str, Any]) -> None:
    rows = document["summary"]
    for way in ("slices", "whole", "synchronise"):
        axes.plot([row["tokens"] for row in rows], [row[f"{way}_ratio"]["p50"] for row in rows], marker="o", label=way)
    axes.axhline(1.0, color="grey", linestyle="--")
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="throughput over stock, median")
    axes.legend()


def _kernels(axes: Any, document: dict[str, Any]) -> None:
    rows = document["rows"]
    axes.barh([f"{row['kernel']}\n{row['shape']}" for row in rows], [row["over_floor"] for row in rows])
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="time over floor")
