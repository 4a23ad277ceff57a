"""Whether interrupted forward passes equal uninterrupted ones: logits, and K and V of every layer.

Two prompts of one length and one of another are computed alone, twice, and then in turns, each stopped at random
boundaries; in slices and with whole operators. Where two uninterrupted runs are equal bit for bit, so must be the
interrupted one; else it may be as far off as they are from each other, times ``TOLERANCE``. Slices are compared with
slices. How far they are from whole operators is written down beside it: no more than rounding, or the start-up check
would have refused them.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import kit_engine
import torch
from kit_engine import Way

from flowprefill_sglang.integration.preemption.self_test import TOLERANCE

WAYS = (Way.SLICES, Way.WHOLE, Way.UNBOUNDED)


def main() -> int:
    """0 when all are equal."""
    options = kit_engine.options_of(__doc__)
    lengths = (1_024, 1_024, 3_000) if options.device == "cuda" else (96, 96, 300)
    schedules = 60 if options.device == "cuda" else 6
    bench = kit_engine.Bench(options, 2 * sum(lengths))
    rng, deadline_at = random.Random(options.seed), time.monotonic() + options.seconds
    prompts = [[rng.randrange(97, 123) for _ in range(length)] for length in lengths]
    first, second = (
        {in_slices: [alone(bench, prompt, in_slices=in_slices) for prompt in prompts] for in_slices in (True, False)}
        for _ in range(2)
    )
    rows: list[dict[str, Any]] = []
    for number in range(schedules):
        if time.monotonic() > deadline_at:
            break
        way = WAYS[number % len(WAYS)]
        is_sliced = way is Way.SLICES
        before = bench.slices
        found, stops = interleaved(bench, prompts, rng, way)
        row: dict[str, Any] = {"schedule": number, "way": way.value, "stops": stops, "slices": bench.slices - before}
        for part, name in enumerate(("logits", "kv")):
            noise = max(distance(a[part], b[part]) for a, b in zip(first[is_sliced], second[is_sliced], strict=True))
            off = max(distance(a[part], b[part]) for a, b in zip(first[is_sliced], found, strict=True))
            row |= {f"{name}_noise": noise, f"{name}_off": off, f"{name}_ok": off <= TOLERANCE * noise}
        rows.append(row)
    is_right = any(row["stops"] for row in rows) and all(row["logits_ok"] and row["kv_ok"] for row in rows)
    exact = all(row["logits_off"] == row["kv_off"] == 0 for row in rows)
    summary = {"schedules": len(rows), "stops": sum(row["stops"] for row in rows), "ok": is_right, "bit_equal": exact}
    for part, name in enumerate(("logits", "kv")):
        pairs = zip(first[False], first[True], strict=True)
        summary[f"{name}_slices_off_whole"] = max(distance(whole[part], sliced[part]) for whole, sliced in pairs)
    kit_engine.write(options, {"sliced": bench.sliced, "summary": summary, "rows": rows})
    print(summary)
    return 0 if is_right else 1


def alone(bench: kit_engine.Bench, prompt: list[int], *, in_slices: bool) -> list[torch.Tensor]:
    """Logits, and all of K and V in one tensor, of SGLang's own forward pass or of an undisturbed one in slices."""
    request = bench.engine.request(prompt)
    if not in_slices:
        logits = bench.engine.run(bench.engine.batch([request]))[0].clone()
        return taken(bench, request, logits)
    device, task = bench.use(Way.SLICES), bench.task(request)
    bench.finish(task, device, bench.cost(len(prompt)))
    return taken(bench, request, task.result[0].clone())


def taken(bench: kit_engine.Bench, request: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    """The result of one prompt, whose KV is given back."""
    kv = torch.stack([tensor for pair in bench.engine.kv(request) for tensor in pair])
    bench.engine.release(request, keep=False)
    return [logits, kv]


def interleaved(
    bench: kit_engine.Bench, prompts: list[list[int]], rng: random.Random, way: Way
) -> tuple[list[list[torch.Tensor]], int]:
    """The same, and how often a task was stopped."""
    device = bench.use(way)
    requests = [bench.engine.request(prompt) for prompt in prompts]
    tasks = [bench.task(request) for request in requests]
    every = rng.choice((2, 5, 20))
    bench.gate.watch(lambda: rng.randrange(every) == 0)
    try:
        while left := [number for number, task in enumerate(tasks) if not task.is_over]:
            number = rng.choice(left)
            device.runs(bench.cost(len(prompts[number])))
            device.stopped(has_ended=tasks[number].advance())
    finally:
        bench.gate.watch(None)
    results = [taken(bench, r, task.result[0].clone()) for r, task in zip(requests, tasks, strict=True)]
    return results, sum(task.suspensions for task in tasks)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; infinite if something is no number."""
    off = float((a.float() - b.float()).abs().max())
    return off if off == off else float("inf")


if __name__ == "__main__":
    sys.exit(main())
