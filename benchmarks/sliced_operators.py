"""What slicing of long operators gives and costs: the longest time between two boundaries, and the time of the whole.

The same forward pass, on a real SGLang model in this process, in turns: with whole operators and with several blocking
targets. Costs come from a short calibration, as in a worker. Prompts differ, the order of the targets is drawn anew in
each turn, and ratios are taken within a turn. Nothing is preempted: slices are run in any case.

    OMP_NUM_THREADS=1 python benchmarks/sliced_operators.py --json result.json
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from operator_gaps import WHOLE, OperatorGaps
from results_file import write_result

from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.workload.tiny_model import make_deep_model


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,4096,16000")
    parser.add_argument("--targets-ms", default="2,5,20", help="beside whole operators")
    parser.add_argument("--repeats", type=int, default=8, help="turns for each length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smoke run: one turn of a short prompt")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    targets = [WHOLE, *(float(target) for target in options.targets_ms.split(","))]
    repeats = options.repeats
    if options.quick:
        lengths, repeats = [1024], 1
    path, shape = make_deep_model()
    rows = measure(OperatorGaps(str(path), max(lengths)), lengths, targets, repeats, random.Random(options.seed))
    summary = summarise(rows, lengths, targets)
    for line in summary:
        print(line)
    if options.json:
        write_result(
            options.json,
            seed=options.seed,
            measured={"model": asdict(shape), "threads": torch.get_num_threads(), "summary": summary, "rows": rows},
        )
    return 0


def measure(
    forwards: OperatorGaps, lengths: Sequence[int], targets: Sequence[float], repeats: int, rng: random.Random
) -> list[dict[str, Any]]:
    """One row for each forward pass."""
    rows = []
    for turn in range(-1, repeats):  # the first one warms up
        for length in lengths:
            for target_ms in rng.sample(list(targets), len(targets)):
                gaps_ms = forwards.gaps_ms(length, target_ms, rng)
                if turn < 0:
                    continue
                rows.append(
                    {
                        "turn": turn,
                        "tokens": length,
                        "target_ms": target_ms,
                        "boundaries": len(gaps_ms) - 1,
                        "forward_ms": round(sum(gaps_ms), 3),
                        "longest_ms": round(max(gaps_ms), 3),
                        "p99_ms": round(percentile(gaps_ms, 99), 3),
                        "mean_blocking_ms": round(sum(gap * gap for gap in gaps_ms) / 2 / sum(gaps_ms), 3),
                    }
                )
    return rows


def summarise(rows: Sequence[dict[str, Any]], lengths: Sequence[int], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Medians over turns; ``throughput`` is that of whole operators in the same turn over this one's, quartiles."""
    found = []
    for length in lengths:
        whole = {row["turn"]: row for row in rows if (row["tokens"], row["target_ms"]) == (length, WHOLE)}
        for target in targets:
            here = [row for row in rows if (row["tokens"], row["target_ms"]) == (length, target)]
            ratios = [whole[row["turn"]]["forward_ms"] / row["forward_ms"] for row in here]
            found.append(
                {"tokens": length, "target_ms": target, "boundaries": here[0]["boundaries"]}
                | {
                    key: round(percentile([row[key] for row in here], 50), 2)
                    for key in ("forward_ms", "longest_ms", "p99_ms", "mean_blocking_ms")
                }
                | {"throughput": [round(percentile(ratios, share), 3) for share in (25, 50, 75)]}
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
