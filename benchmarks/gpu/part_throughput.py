"""Throughput of one long prefill alone, over SGLang's own forward pass: in slices, whole, and waiting at boundaries.

They take turns, between two forward passes of SGLang's own: ``stock`` is the same process with boundaries closed, which
costs a fraction of a microsecond an operator.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import kit_engine
from kit_engine import Way

from flowprefill_sglang.bench.report import percentile

OURS = (Way.SLICES, Way.WHOLE, Way.SYNCHRONISE)


def main() -> int:
    """Measure and write."""
    options = kit_engine.options_of(__doc__)
    is_cuda = options.device == "cuda"
    lengths, turns = ((8_192, 32_768, 131_072), 20) if is_cuda else ((256, 1_024), 3)
    bench = kit_engine.Bench(options, lengths[-1])
    deadline_at = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for turn in range(-1, turns):  # the first one warms up
        for length in lengths:
            if time.monotonic() > deadline_at:
                break
            row: dict[str, Any] = {"turn": turn, "tokens": length}
            row["stock_s"] = bench.plain_s(length)
            for way in OURS if turn % 2 else reversed(OURS):
                row[f"{way}_s"] = bench.task_s(length, way)
            row["stock_s"] = (row["stock_s"] + bench.plain_s(length)) / 2  # before and after
            if turn >= 0:
                rows.append(row)
    summary = []
    for length in lengths:
        mine = [row for row in rows if row["tokens"] == length]
        if not mine:
            continue
        entry: dict[str, Any] = {"tokens": length, "pairs": len(mine)}
        entry["stock_ms"] = round(1_000 * percentile([row["stock_s"] for row in mine], 50), 3)
        for way in OURS:
            ratios = [row["stock_s"] / row[f"{way}_s"] for row in mine]
            entry[f"{way}_ratio"] = {f"p{p}": round(percentile(ratios, p), 4) for p in (25, 50, 75)}
        summary.append(entry)
        print(entry)
    kit_engine.write(
        options, {"sliced": bench.sliced, "summary": summary, "boundaries": bench.boundaries, "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
