"""From the arrival of an urgent prompt until its first kernel, against the length of the prompt that is computed then.

One long prompt at a time, and some arrivals at random moments of it. On a GPU both moments are CUDA events. ``slices``
is FlowPrefill, ``whole`` the same without slices, ``synchronise`` waits for the device at every boundary (the paper's
way), ``unbounded`` lets the device run ahead, and ``stock-2048`` are SGLang's own forward passes of chunks of 2,048
tokens, where the urgent prompt waits for the running chunk only: the best that chunks can do, since stock SGLang goes
on with the next one.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import kit_engine

from flowprefill_sglang.bench.report import percentile

URGENT_TOKENS = 16
STOCK = "stock"
MOST_ARRIVALS, FEWEST_TOKENS = 10, 4_096
"""Arrivals in one long prompt: one for each so many tokens of it, and at most so many."""


def main() -> int:
    """Measure and write; 1 when some way met no arrival."""
    options = kit_engine.options_of(__doc__)
    is_cuda = options.device == "cuda"
    lengths = (1_024, 4_096, 16_384, 65_536, 131_072) if is_cuda else (128, 512)
    wanted, chunk = (100, 2_048) if is_cuda else (4, 64)
    bench = kit_engine.Bench(options, lengths[-1])
    rng, deadline_at = random.Random(options.seed), time.monotonic() + options.seconds
    ways = [*(way.value for way in kit_engine.Way), f"{STOCK}-{chunk}"]
    rows: list[dict[str, Any]] = []
    alone_s = {length: min(bench.plain_s(length) for _ in range(2)) for length in lengths}
    for turn in range(wanted):
        # All lengths in each turn: when time runs out, each has about as many.
        for length in lengths:
            for way in ways:
                if time.monotonic() > deadline_at:
                    break
                many = max(1, min(MOST_ARRIVALS, length // FEWEST_TOKENS))
                delays_s = [rng.uniform(0.1, 0.9) * alone_s[length] / many for _ in range(many)]
                blocked_ms = (
                    behind_chunks(bench, length, chunk, delays_s)
                    if way.startswith(STOCK)
                    else behind_task(bench, length, kit_engine.Way(way), delays_s)
                )
                rows += [
                    {"turn": turn, "tokens": length, "way": way, "blocked_ms": round(value, 4)} for value in blocked_ms
                ]
    summary = [summarise(rows, length, way, alone_s[length]) for length in lengths for way in ways]
    kit_engine.write(options, {"sliced": bench.sliced, "summary": summary, "rows": rows})
    for row in summary:
        print(row)
    met = {row["way"] for row in rows}
    return 0 if met == set(ways) else 1


def summarise(rows: list[dict[str, Any]], length: int, way: str, alone_s: float) -> dict[str, Any]:
    """Percentiles of one length and way."""
    found = [row["blocked_ms"] for row in rows if row["tokens"] == length and row["way"] == way]
    row: dict[str, Any] = {"tokens": length, "way": way, "arrivals": len(found), "alone_ms": round(1_000 * alone_s, 3)}
    if found:
        row |= {f"p{p}_ms": round(percentile(found, p), 4) for p in (50, 99)} | {"max_ms": max(found)}
    return row


def behind_task(bench: kit_engine.Bench, length: int, way: kit_engine.Way, delays_s: Sequence[float]) -> list[float]:
    """One value for each arrival that met the long prompt, each so long after the one before it."""
    device = bench.use(way)
    long = bench.prompt(length)
    task, cost = bench.task(long), bench.cost(length)
    blocked_ms: list[float] = []
    bench.synchronise()
    for delay_s in delays_s:
        moments = kit_engine.Moments(bench.is_cuda)
        timer = threading.Timer(delay_s, arrive, (moments, bench.gate.raise_flag))
        timer.start()
        device.runs(cost)
        has_ended = task.advance()
        device.stopped(has_ended=has_ended)
        if not has_ended:
            blocked_ms.append(run_urgent(bench, moments))
        timer.join()
        bench.gate.clear()
        if has_ended:
            break
    bench.finish(task, device, cost)
    bench.engine.release(long, keep=False)
    return blocked_ms


def arrive(moments: kit_engine.Moments, tell: Callable[[], None]) -> None:
    """On a thread of its own."""
    moments.arrival()
    tell()


def run_urgent(bench: kit_engine.Bench, moments: kit_engine.Moments) -> float:
    """Make the urgent prompt's batch, as a worker does now, and compute it."""
    bench.gate.clear()
    request = bench.prompt(URGENT_TOKENS)
    batch = bench.engine.batch([request])
    moments.first_kernel()
    bench.engine.run(batch)
    bench.engine.release(request, keep=False)
    return moments.between_ms()


def behind_chunks(bench: kit_engine.Bench, length: int, chunk: int, delays_s: Sequence[float]) -> list[float]:
    """The same with SGLang's chunks."""
    long, blocked_ms, left = bench.prompt(length), list[float](), list(delays_s)
    waiting: tuple[kit_engine.Moments, threading.Event, threading.Timer] | None = None
    bench.synchronise()
    for begin in range(0, length, chunk):
        if waiting is None and left:
            moments, arrived = kit_engine.Moments(bench.is_cuda), threading.Event()
            waiting = moments, arrived, threading.Timer(left.pop(), arrive, (moments, arrived.set))
            waiting[2].start()
        bench.engine.run(bench.engine.batch([long], chunk_tokens=chunk))
        if begin + chunk >= length:
            break
        bench.engine.checkpoint(long)
        if waiting is not None and waiting[1].is_set():
            blocked_ms.append(run_urgent(bench, waiting[0]))
            waiting = None
    if waiting is not None:
        waiting[2].join()
    bench.engine.release(long, keep=False)
    return blocked_ms


if __name__ == "__main__":
    sys.exit(main())
