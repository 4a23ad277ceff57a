"""Correcting a cost model online: one ratio for everything, a factor for each part, or recursive least squares.

Synthetic. A machine takes what the tiny model takes on a CPU, changed by a scenario, with 4% of noise and now and then
a disturbed measurement (2, 3 or 10 times as long). A predictor that starts with the unchanged model predicts 600
forwards one after another and learns from each; the change comes after 300. Counted are the errors of its predictions
against the undisturbed time: of the last 200 forwards, and of the first 30 after the change.

    python benchmarks/predictor_drift.py --json result.json
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.core.prefill_cost import CostModel, Extent, Predictor

MODEL = CostModel(
    base_s=7.1e-3,
    request_s=6e-4,
    short_token_s=2.9e-5,
    long_token_s=4.1e-5,
    knee_tokens=1024,
    pair_s=2.7e-8,
    cached_token_s=8e-6,
    cached_pair_s=2.4e-8,
)
FORWARDS, CHANGE_AT, NOISE = 600, 300, 0.04
ALIKE, OVERHEAD, ATTENTION, BALANCE = (1.5, 1.5, 1.5), (2.0, 1.0, 1.0), (1.0, 1.0, 1.5), (1.25, 1.0, 0.85)
SCENARIOS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], str]] = {
    # factors of overhead, tokens and attention before the change, and after it, and the lengths: mixed, or short first
    "nothing changes": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), "mixed"),
    "all 1.5 times slower": ((1.0, 1.0, 1.0), ALIKE, "mixed"),
    "overhead doubles": ((1.0, 1.0, 1.0), OVERHEAD, "mixed"),
    "attention 1.5 times slower": ((1.0, 1.0, 1.0), ATTENTION, "mixed"),
    "wrong from the start, lengths change": (BALANCE, BALANCE, "short first"),
    "1.5 times slower, lengths change": ((1.0, 1.0, 1.0), ALIKE, "short first"),
}
Batch = tuple[Extent, ...]


class Corrector(Protocol):
    """What is compared."""

    def seconds(self, batch: Batch) -> float: ...
    def observe_batch(self, batch: Batch, measured_s: float) -> None: ...


class OneRatio:
    """An exponentially weighted ratio of measured to predicted seconds, in logarithms, each step cut at ``cut``."""

    def __init__(self, weight: float, cut: float = 0.3) -> None:
        self._log, self._weight, self._cut = 0.0, weight, cut

    def seconds(self, batch: Batch) -> float:
        return math.exp(self._log) * MODEL.seconds(batch)

    def observe_batch(self, batch: Batch, measured_s: float) -> None:
        error = math.log(measured_s / self.seconds(batch))
        self._log += self._weight * max(-self._cut, min(self._cut, error))


class LeastSquares:
    """Recursive least squares of the relative error for the factors of the three parts, with forgetting."""

    def __init__(self, forgetting: float) -> None:
        self._factors, self._covariance, self._forgetting = np.ones(3), np.eye(3) * 0.1, forgetting

    def seconds(self, batch: Batch) -> float:
        return max(1e-4, float(self._factors @ MODEL.parts(batch)))

    def observe_batch(self, batch: Batch, measured_s: float) -> None:
        predicted = self.seconds(batch)
        measured = predicted * min(2.0, max(0.5, measured_s / predicted))
        row = np.array(MODEL.parts(batch)) / measured
        gain = self._covariance @ row / (self._forgetting + row @ self._covariance @ row)
        self._factors = np.maximum(0.03, self._factors + gain * (1 - self._factors @ row))
        covariance = (self._covariance - np.outer(gain, row @ self._covariance)) / self._forgetting
        self._covariance = covariance * min(1.0, 10.0 / np.trace(covariance))  # else it grows while lengths are alike


CORRECTORS: dict[str, Callable[[], Corrector]] = {
    "one ratio, weight 0.1": lambda: OneRatio(0.1),
    "one ratio, weight 0.2": lambda: OneRatio(0.2),
    "least squares, 0.95": lambda: LeastSquares(0.95),
    "least squares, 0.98": lambda: LeastSquares(0.98),
    "a factor for each part": lambda: Predictor(MODEL),
}


def main() -> int:
    """Run all pairs of correctors and scenarios, print a table, write the rows."""
    parser = argparse.ArgumentParser(description="Online correction of a cost model under synthetic drift.")
    parser.add_argument("--json", type=Path, help="write provenance and raw rows here")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    rows = [
        one_pair(corrector, scenario, outliers, options.seeds)
        for outliers in (0.05, 0.2)
        for scenario in SCENARIOS
        for corrector in CORRECTORS
    ]
    print(f"{'disturbed':<10}{'scenario':<38}{'corrector':<24}{'median':>8}{'p90':>8}{'first 30':>10}")
    for row in rows:
        print(
            f"{row['disturbed']:<10.0%}{row['scenario']:<38}{row['corrector']:<24}"
            f"{row['median_error']:8.1%}{row['p90_error']:8.1%}{row['mean_error_of_first_30']:10.1%}"
        )
    if options.json:
        write_result(options.json, seed=0, measured={"seeds": options.seeds, "rows": rows})
    return 0


def one_pair(corrector: str, scenario: str, outliers: float, seeds: int) -> dict[str, Any]:
    """Errors over all seeds."""
    found = np.array([run(CORRECTORS[corrector](), scenario, outliers, random.Random(seed)) for seed in range(seeds)])
    after = found[:, CHANGE_AT:]
    return {
        "disturbed": outliers,
        "scenario": scenario,
        "corrector": corrector,
        "median_error": float(np.median(after[:, 100:])),
        "p90_error": float(np.quantile(after[:, 100:], 0.9)),
        "mean_error_of_first_30": float(np.mean(after[:, :30])),
    }


def run(corrector: Corrector, scenario: str, outliers: float, rng: random.Random) -> list[float]:
    """Relative error of each prediction."""
    before, after, lengths = SCENARIOS[scenario]
    found = []
    for index in range(FORWARDS):
        has_changed = index >= CHANGE_AT
        batch = some_batch(rng, lengths, has_changed)
        factors = after if has_changed else before
        really = sum(factor * part for factor, part in zip(factors, MODEL.parts(batch), strict=True))
        found.append(abs(corrector.seconds(batch) / really - 1))
        disturbance = rng.choice((2, 3, 10)) if rng.random() < outliers else 1
        corrector.observe_batch(batch, really * math.exp(rng.gauss(0, NOISE)) * disturbance)
    return found


def some_batch(rng: random.Random, lengths: str, has_changed: bool) -> Batch:
    """A long prompt alone, or one or two short ones."""
    long_share = 0.25 if lengths == "mixed" else float(has_changed)
    if rng.random() < long_share:
        return (Extent(round(2 ** rng.uniform(10, 13.5))),)
    return (Extent(round(2 ** rng.uniform(4, 9))),) * rng.choice((1, 1, 2))


if __name__ == "__main__":
    sys.exit(main())
