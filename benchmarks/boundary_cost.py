"""What an operator boundary costs when nobody preempts, and what a stop at every one of them costs.

The same forward pass, on a real SGLang model in this process, in turns:

* ``plain``: SGLang's operators as they are;
* ``closed``: with boundaries, outside of a task;
* ``task``: in a task that no event stops, as nearly all are: a flag is checked at each boundary;
* ``stopped``: in a task that is suspended and resumed at every boundary, with all the state that SGLang shares.

Prompts differ, the order of the kinds is drawn anew in each turn, and differences are taken within a turn.

With ``--tp N`` instead what the lease adds at a boundary that N ranks cross together (``lease_cost.py``).

    OMP_NUM_THREADS=1 python benchmarks/boundary_cost.py --json result.json
    OMP_NUM_THREADS=1 python benchmarks/boundary_cost.py --tp 2 --json result.json
"""

from __future__ import annotations

import argparse
import pkgutil
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from lease_cost import measure_lease, summarize_lease
from results_file import write_result

from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
from flowprefill_sglang.integration.preemption.forward_state import ForwardState
from flowprefill_sglang.integration.preemption.operator_boundaries import install
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.task import ForwardTask
from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_deep_model

KINDS = ("plain", "closed", "task", "stopped")


class Boundaries:
    """SGLang's operators with boundaries or without."""

    def __init__(self, gate: Gate) -> None:
        self._wrapped = []
        for name in install(gate, SlicedOperators(gate)):  # as a worker, where no operator is sliced
            owner, _, method = name.rpartition(".")
            cls = pkgutil.resolve_name(owner)
            self._wrapped.append((cls, method, vars(cls)[method]))

    def put(self) -> None:
        """With."""
        for cls, method, function in self._wrapped:
            setattr(cls, method, function)

    def take_away(self) -> None:
        """Without."""
        for cls, method, function in self._wrapped:
            setattr(cls, method, function.__wrapped__)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="64,128,1024")
    parser.add_argument("--repeats", type=int, default=200, help="turns for each length; fewer for long ones")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks; from 2 on, what their lease costs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smoke run: five turns")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]

    def repeats(tokens: int) -> int:
        return 5 if options.quick else max(20, options.repeats * 128 // max(128, tokens))

    if options.tp > 1:
        rows = measure_lease(options.tp, lengths, repeats, options.seed)
        measured: dict[str, Any] = {"ranks": options.tp, "summary": summarize_lease(rows)}
    else:
        rows, shape = measure(lengths, repeats, random.Random(options.seed))
        measured = {"model": asdict(shape), "summary": summarize(rows)}
    for line in measured["summary"]:
        print(line)
    if options.json:
        write_result(options.json, seed=options.seed, measured=measured | {"rows": rows})
    return 0


def measure(
    lengths: Sequence[int], repeats: Callable[[int], int], rng: random.Random
) -> tuple[list[dict[str, Any]], TinyModelShape]:
    """A row for each turn, and the model's shape."""
    model, shape = make_deep_model()
    engine = OfflineEngine(str(model), device="cpu", max_total_tokens=8_192, chunked_prefill_size=-1)
    rows = []
    with torch.no_grad():  # as a worker's loop
        forward = Forward(engine)
        for tokens in lengths:
            rows += forward.measure(tokens, repeats(tokens), rng)
    return rows, shape


class Forward:
    """One forward pass of each kind."""

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self._gate = Gate()
        self._boundaries = Boundaries(self._gate)
        self._state = ForwardState(engine.model_runner)
        slots = AttentionSlots(engine.model_runner, self._gate)
        slots.reserve(1)
        slots.install()

    def measure(self, tokens: int, repeats: int, rng: random.Random) -> list[dict[str, Any]]:
        """A row for each turn: milliseconds by kind, and the boundaries of the pass."""
        rows = []
        for turn in range(-5, repeats):  # the first ones warm up
            row: dict[str, Any] = {"tokens": tokens, "turn": turn}
            for kind in rng.sample(KINDS, len(KINDS)):
                row[f"{kind}_ms"], crossed = self._run(kind, tokens, rng)
                row["boundaries"] = max(crossed, row.get("boundaries", 0))
            if turn >= 0:
                rows.append(row)
        return rows

    def _run(self, kind: str, tokens: int, rng: random.Random) -> tuple[float, int]:
        (self._boundaries.take_away if kind == "plain" else self._boundaries.put)()
        request = self._engine.request([rng.randrange(10, 250) for _ in range(tokens)])
        batch = self._engine.batch([request])
        run: Callable[[], Any] = lambda: self._engine.run(batch)  # noqa: E731
        if kind in ("task", "stopped"):
            run = self._in_task(run)
        if kind == "stopped":
            self._gate.raise_flag()
        before = self._gate.boundaries
        began_at = time.perf_counter()
        run()
        took_s = time.perf_counter() - began_at
        self._gate.clear()
        self._engine.release(request, keep=False)
        return round(1_000 * took_s, 4), self._gate.boundaries - before

    def _in_task(self, run: Callable[[], Any]) -> Callable[[], Any]:
        def run_to_its_end() -> None:
            task = ForwardTask(run, self._gate, self._state)
            while not task.advance():
                pass

        return run_to_its_end


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians for each length, and what a boundary costs: the median difference over their number."""
    summaries = []
    for tokens in sorted({row["tokens"] for row in rows}):
        turns = [row for row in rows if row["tokens"] == tokens]
        count = max(row["boundaries"] for row in turns)
        summary: dict[str, Any] = {"tokens": tokens, "turns": len(turns), "boundaries": count}
        for kind in KINDS:
            summary[f"{kind}_ms"] = round(percentile([row[f"{kind}_ms"] for row in turns], 50), 4)
        for kind in KINDS[1:]:
            more_ms = percentile([row[f"{kind}_ms"] - row["plain_ms"] for row in turns], 50)
            summary[f"{kind}_us_per_boundary"] = round(1_000 * more_ms / count, 3)
        summaries.append(summary)
    return summaries


if __name__ == "__main__":
    sys.exit(main())
