"""Throughput of one long prefill alone, over SGLang's own forward pass: bounded run-ahead, and waiting at boundaries.

The three take turns. ``stock`` is the same process with boundaries closed: SGLang's forward pass, but for a fraction of
a microsecond an operator.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import kit_engine

from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.prefill_worker.settings import RunAheadKind

OURS = (RunAheadKind.BUDGET, RunAheadKind.SYNCHRONISE)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    kit_engine.add_arguments(parser)
    options = parser.parse_args()
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
            for kind in OURS if turn % 2 else reversed(OURS):
                row[f"{kind}_s"] = bench.task_s(length, kind)
                if kind is OURS[0]:  # beside it, before or after the other one
                    row["stock_s"] = bench.plain_s(length)
            if turn >= 0:
                rows.append(row)
    summary = []
    for length in lengths:
        mine = [row for row in rows if row["tokens"] == length]
        if not mine:
            continue
        entry: dict[str, Any] = {"tokens": length, "pairs": len(mine)}
        entry["stock_ms"] = round(1_000 * percentile([row["stock_s"] for row in mine], 50), 3)
        for kind in OURS:
            ratios = [row["stock_s"] / row[f"{kind}_s"] for row in mine]
            entry[f"{kind}_ratio"] = {f"p{p}": round(percentile(ratios, p), 4) for p in (25, 50, 75)}
        summary.append(entry)
        print(entry)
    kit_engine.write(options, {"summary": summary, "boundaries": bench.boundaries, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
