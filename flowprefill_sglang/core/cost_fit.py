"""Coefficients of a cost model from measured forwards: non-negative least squares of the relative error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flowprefill_sglang.core.prefill_cost import CostModel, Extent

COEFFICIENTS: Final = (
    "base_s",
    "request_s",
    "short_token_s",
    "long_token_s",
    "pair_s",
    "cached_token_s",
    "cached_pair_s",
)

KNEE_GAIN: Final = 0.8
"""A knee must cut the squared error on left-out samples to this share: otherwise it follows the noise."""
GOOD_ENOUGH: Final = 1e-6
"""Squared error of 0.1%: no knee is looked for beyond."""
PAIR_LENGTHS: Final = 4
"""Attention has a cost of its own only if so many lengths were measured: with fewer it cannot be told from noise. As it
grows with the square of the length, a little noise would predict a long prompt many times too slow."""
FOLDS: Final = 5
TOLERANCE: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured forward."""

    extents: tuple[Extent, ...]
    seconds: float


def fit(samples: Sequence[Sample]) -> CostModel:
    """The model with the least squared relative error on ``samples``.

    Relative to what was measured: a forward of 64 tokens that is predicted 50% wrong hurts a schedule as much as one of
    8,000, and a measurement that something disturbed cannot count for more than 1. A knee is used only if it predicts
    samples that were left out of the fit clearly better. Raises ValueError for samples not positive, or too few.
    """
    if len(samples) < 2 or not all(0 < s.seconds < np.inf and s.extents for s in samples):
        raise ValueError(f"a fit needs at least two forwards that took time, got {len(samples)} samples")
    error_without = _left_out_error(samples, 0)
    error_with = {knee: _left_out_error(samples, knee) for knee in _knees(samples)}
    knee = min(error_with, key=error_with.__getitem__, default=0)
    if error_without < GOOD_ENOUGH or error_with.get(knee, math.inf) > KNEE_GAIN * error_without:
        knee = 0
    coefficients = map(float, _non_negative(_relative(samples, knee)))
    return CostModel(**dict(zip(COEFFICIENTS, coefficients, strict=True)), knee_tokens=knee)


def errors(model: CostModel, samples: Sequence[Sample]) -> list[float]:
    """Relative error of each prediction, |predicted − measured| / measured."""
    return [abs(model.seconds(s.extents) - s.seconds) / s.seconds for s in samples]


def _knees(samples: Sequence[Sample]) -> Sequence[int]:
    """Each measured number of new tokens that leaves at least two on either side."""
    return sorted({_new_tokens(sample) for sample in samples})[1:-2]


def _left_out_error(samples: Sequence[Sample], knee: int) -> float:
    """Mean squared relative error on every fifth sample of a fit to the others, over all five choices."""
    matrix = _relative(samples, knee)
    fold = np.arange(len(samples)) % FOLDS
    left_out = [
        matrix[fold == part] @ _non_negative(matrix[fold != part]) - 1 for part in range(min(FOLDS, len(samples)))
    ]
    return float(np.mean(np.concatenate(left_out) ** 2))


def _new_tokens(sample: Sample) -> int:
    return sum(extent.new_tokens for extent in sample.extents)


def _relative(samples: Sequence[Sample], knee: int) -> NDArray[np.float64]:
    """[samples, coefficients]: each term of the model's formula over the measured seconds."""
    pairs_count = len({_new_tokens(sample) for sample in samples}) >= PAIR_LENGTHS
    rows = []
    for sample in samples:
        tokens = _new_tokens(sample)
        rows.append(
            (
                1.0,
                len(sample.extents),
                min(tokens, knee),
                max(0, tokens - knee),
                pairs_count * sum(e.new_tokens * (0.5 * e.new_tokens + e.cached_tokens) for e in sample.extents),
                sum(e.cached_tokens for e in sample.extents),
                sum(0.5 * e.cached_tokens**2 for e in sample.extents),
            )
        )
    seconds = np.array([sample.seconds for sample in samples])
    return np.asarray(np.array(rows) / seconds[:, None], dtype=np.float64)


def _non_negative(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x ≥ 0 with the least ‖matrix·x − 1‖² (Lawson and Hanson's active set method)."""
    scale = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(scale > 0, scale, 1.0)
    solution = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    for _ in range(10 * matrix.shape[1]):  # each step frees a column or gives one up; cycles would need exact ties
        gradient = scaled.T @ (1.0 - scaled @ solution)
        entering = int(np.argmax(np.where(free, -np.inf, gradient)))
        if free.all() or gradient[entering] <= TOLERANCE * len(matrix):
            break
        free[entering] = True
        while True:
            target = np.zeros_like(solution)
            target[free] = np.linalg.lstsq(scaled[:, free], np.ones(len(matrix)), rcond=None)[0]
            if (target[free] > 0).all():
                break
            blocked = free & (target <= 0)
            step = np.min(solution[blocked] / (solution[blocked] - target[blocked]))
            solution += step * (target - solution)
            free &= solution > TOLERANCE
            solution[~free] = 0.0
        solution = target
    return np.asarray(solution / np.where(scale > 0, scale, 1.0), dtype=np.float64)
