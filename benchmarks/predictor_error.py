"""How far predictions of prefill time are off, on lengths and batches that the cost model was not fitted to.

Each repeat measures a grid and 40 other batches (single prompts, cached prefixes, several requests) on the tiny model,
as ``flowprefill profile`` does, fits the grid and predicts the others, with two forms of the model: three coefficients
(constant, new tokens, pairs of attention), and the full one. Then it calibrates as a worker without a cost file does
at its start, and predicts the same batches with that.

    OMP_NUM_THREADS=1 python benchmarks/predictor_error.py --json result.json

``--clock cpu`` counts the CPU seconds of the computing thread instead of the wall's, which says how good the form is on
a machine that is busy with other things; it needs OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.core.calibration import calibrate, grid, held_out, measure
from flowprefill_sglang.core.cost_fit import Sample, errors, fit
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.integration.costs.cost_model import START_UP_BUDGET_S, limits
from flowprefill_sglang.integration.costs.profiling import ForwardTimer
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.workload.tiny_model import make_tiny_model

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
HELD_OUT = 40


def main() -> int:
    """Run the repeats, print a table, write the raw rows."""
    parser = argparse.ArgumentParser(description="Error of predicted prefill times on held-out batches.")
    parser.add_argument("--json", type=Path, help="write provenance and raw rows here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure the grid and the others in, per repeat")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    options = parser.parse_args()
    engine = OfflineEngine(str(make_tiny_model()), max_total_tokens=40_000, log_level="error")
    timer = ForwardTimer(engine.model_runner, engine.scheduler.tree_cache, CLOCKS[options.clock])
    rows = [one_repeat(engine, timer, options.seconds, seed) for seed in range(options.repeats)]
    for form in ("three_coefficients", "full", "start_up"):
        medians = [row[form]["median_error"] for row in rows]
        tenths = [row[form]["p90_error"] for row in rows]
        print(f"{form:<20} median {spread(medians)}   p90 {spread(tenths)}")
    if options.json:
        load = os.getloadavg()
        write_result(options.json, seed=0, measured={"clock": options.clock, "load_average": load, "rows": rows})
    return 0


def one_repeat(engine: OfflineEngine, timer: ForwardTimer, seconds: float, seed: int) -> dict[str, Any]:
    """Errors of the forms on held-out batches, and everything measured."""
    runner, chunk = engine.model_runner, engine.scheduler.chunked_prefill_size
    allowed = limits(runner, chunk, seconds, length_factor=2.0)
    others = set(held_out(allowed, HELD_OUT, random.Random(seed)))
    measured = measure(timer, allowed, [*grid(allowed), *others])
    seen = [m.sample for m in measured if m.batch not in others]
    unseen = [m.sample for m in measured if m.batch in others]
    short = calibrate(timer, limits(runner, chunk, START_UP_BUDGET_S))
    full = fit(seen)
    return {
        "held_out": len(unseen),
        "three_coefficients": summary(three_coefficients(seen), unseen),
        "full": summary(full, unseen),
        "start_up": summary(short, unseen),
        "measured": [
            {
                "new_tokens": [e.new_tokens for e in m.batch],
                "cached_tokens": [e.cached_tokens for e in m.batch],
                "runs_s": m.seconds,
                "predicted_s": full.seconds(m.batch),
                "is_held_out": m.batch in others,
            }
            for m in measured
        ],
    }


def summary(model: CostModel, samples: Sequence[Sample]) -> dict[str, Any]:
    """Relative errors of a model, and its coefficients."""
    found = errors(model, samples)
    coefficients = {name: getattr(model, name) for name in model.__struct_fields__}
    return {"median_error": median(found), "p90_error": quantiles(found, n=10)[-1], "coefficients": coefficients}


def three_coefficients(samples: Sequence[Sample]) -> CostModel:
    """seconds = c + a·new + b·new·(new + 2·cached)/2, by least squares of the relative error."""
    terms = [
        (
            1,
            sum(e.new_tokens for e in s.extents),
            sum(e.new_tokens * (e.new_tokens / 2 + e.cached_tokens) for e in s.extents),
        )
        for s in samples
    ]
    matrix = np.array(terms) / np.array([s.seconds for s in samples])[:, None]
    base, token, pair = (max(0.0, float(x)) for x in np.linalg.lstsq(matrix, np.ones(len(matrix)), rcond=None)[0])
    return CostModel(base_s=base, short_token_s=token, long_token_s=token, pair_s=pair)


def spread(values: Sequence[float]) -> str:
    """Median and range, in percent."""
    return f"{median(values):6.1%} ({min(values):.1%}–{max(values):.1%})"


if __name__ == "__main__":
    sys.exit(main())
