"""What the depth of Python's stack does to a forward pass, and what ``prefill_worker.frame_room`` does about it.

CPython keeps frames in chunks of 16 KiB, and maps and unmaps one at every call that crosses the end of a chunk. The
same forward pass of the same prompt, on a real SGLang model in this process, begins at different depths, in turns,
straight and inside of ``with_frame_room``. The worst depth is not far-fetched: how deep a worker's loop calls a forward
is up to decorators, profilers and plugins.

    OMP_NUM_THREADS=1 python benchmarks/frame_depth.py --json result.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.prefill_worker.frame_room import with_frame_room
from flowprefill_sglang.workload.tiny_model import make_deep_model

STEP_BYTES = 800
DEPTH_BYTES = 16 * 1024
"""One chunk: then it repeats."""


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30, help="for each depth and kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smoke run: two repeats")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    model, shape = make_deep_model(None)
    engine = OfflineEngine(str(model), device="cpu", max_total_tokens=4 * options.tokens, chunked_prefill_size=-1)
    rows = measure(engine, options.tokens, 2 if options.quick else options.repeats, random.Random(options.seed))
    summary = summarize(rows)
    for name, value in summary.items():
        print(f"{name:>28}: {value}")
    if options.json:
        measured = {"model": asdict(shape), "tokens": options.tokens, "summary": summary, "rows": rows}
        write_result(options.json, seed=options.seed, measured=measured)
    return 0


def measure(engine: OfflineEngine, tokens: int, repeats: int, rng: random.Random) -> list[dict[str, Any]]:
    """A row for each depth: milliseconds of every repeat, straight and with room."""
    depths = {size: at_depth(size) for size in range(0, DEPTH_BYTES + 1, STEP_BYTES)}
    rows = [{"depth_bytes": size, "straight_ms": [], "with_room_ms": []} for size in depths]

    def forward_ms(call: Callable[[Callable[[], None]], None]) -> float:
        request = engine.request([rng.randrange(10, 250) for _ in range(tokens)])
        batch = engine.batch([request])
        began_at = time.perf_counter()
        call(lambda: engine.run(batch))
        took_s = time.perf_counter() - began_at
        engine.release(request, keep=False)
        return round(1_000 * took_s, 4)

    for _ in range(10):  # warm up
        forward_ms(with_frame_room)
    for _ in range(repeats):
        rng.shuffle(rows)
        for row in rows:
            deeper = depths[row["depth_bytes"]]
            row["straight_ms"].append(forward_ms(deeper))
            row["with_room_ms"].append(forward_ms(lambda run, go=deeper: go(lambda: with_frame_room(run))))
    return sorted(rows, key=lambda row: int(row["depth_bytes"]))


def at_depth(size: int) -> Callable[[Callable[[], None]], None]:
    """A function that calls its argument from a frame of so many bytes more."""

    def call(function: Callable[[], None]) -> None:
        function()

    call.__code__ = call.__code__.replace(co_stacksize=max(call.__code__.co_stacksize, size // 8))
    return call


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the best and the worst depth, of both kinds."""
    summary = {}
    for kind in ("straight_ms", "with_room_ms"):
        medians = [percentile(row[kind], 50) for row in rows]
        summary |= {
            f"{kind}_best_depth": round(min(medians), 3),
            f"{kind}_worst_depth": round(max(medians), 3),
            f"{kind}_worst_over_best": round(max(medians) / min(medians), 4),
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())
