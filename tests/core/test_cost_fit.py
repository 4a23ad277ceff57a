"""Fitting a cost model to measured forwards."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flowprefill_sglang.core.calibration import Limits, grid
from flowprefill_sglang.core.cost_fit import Sample, _non_negative, errors, fit
from flowprefill_sglang.core.prefill_cost import CostModel, Extent

LIMITS = Limits(max_new_tokens=8192, max_request_tokens=16_384, max_batch_tokens=65_536, length_factor=2.0)
CPU = CostModel(
    base_s=7e-3,
    request_s=6e-4,
    short_token_s=0.0,
    long_token_s=3e-5,
    pair_s=2.5e-8,
    cached_token_s=1.2e-5,
    cached_pair_s=2.4e-8,
)
ROOFLINE = CostModel(base_s=20e-3, short_token_s=1e-6, long_token_s=5e-5, knee_tokens=512, pair_s=1e-9)


def samples(model: CostModel, noise: float, seed: int = 1) -> list[Sample]:
    rng = random.Random(seed)
    batches = [(Extent(round(16 * 2 ** (i / 2))),) for i in range(19)] + grid(LIMITS)
    return [Sample(batch, model.seconds(batch) * (1 + rng.gauss(0, noise))) for batch in batches]


def median_error(model: CostModel, reference: CostModel) -> float:
    rng = random.Random(2)
    batches = [(Extent(rng.randint(16, 8000), rng.choice((0, rng.randint(1, 8000)))),) for _ in range(200)]
    return float(np.median(errors(model, [Sample(batch, reference.seconds(batch)) for batch in batches])))


def test_it_recovers_the_coefficients() -> None:
    found = fit(samples(CPU, noise=0.0))
    assert found.knee_tokens == 0
    for name in ("base_s", "request_s", "long_token_s", "pair_s", "cached_token_s", "cached_pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(CPU, name), rel=1e-6), name


def test_it_recovers_them_from_noisy_samples() -> None:
    found = fit(samples(CPU, noise=0.03))
    assert median_error(found, CPU) < 0.02
    for name in ("base_s", "long_token_s", "pair_s", "cached_pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(CPU, name), rel=0.1), name


def test_it_finds_the_knee_of_a_roofline_and_only_there() -> None:
    found = fit(samples(ROOFLINE, noise=0.02))
    assert found.knee_tokens == pytest.approx(512, rel=0.3)
    assert median_error(found, ROOFLINE) < 0.01
    assert all(fit(samples(CPU, noise=0.03, seed=seed)).knee_tokens == 0 for seed in range(5))


def test_a_disturbed_sample_does_not_spoil_the_fit() -> None:
    measured = samples(CPU, noise=0.0)
    measured[5] = Sample(measured[5].extents, 20 * measured[5].seconds)
    assert median_error(fit(measured), CPU) < 0.03


def test_few_samples() -> None:
    lengths = (16, 128, 1024, 8192)
    found = fit([Sample((Extent(n),), CPU.seconds((Extent(n),))) for n in lengths])
    assert all(found.seconds((Extent(n),)) == pytest.approx(CPU.seconds((Extent(n),)), rel=0.01) for n in lengths)


def test_with_very_few_lengths_attention_is_left_out() -> None:
    measured = [Sample((Extent(16),), 0.20), Sample((Extent(64),), 0.21), Sample((Extent(256),), 0.27)]
    found = fit(measured)
    assert found.pair_s == 0
    assert found.long_token_s > 0


@pytest.mark.parametrize(
    "wrong",
    [[], [Sample((Extent(16),), 1.0)], [Sample((Extent(16),), 1.0), Sample((Extent(32),), 0.0)], [Sample((), 1.0)] * 3],
)
def test_what_cannot_be_fitted(wrong: list[Sample]) -> None:
    with pytest.raises(ValueError, match="at least two forwards"):
        fit(wrong)


def test_non_negative_least_squares_is_optimal() -> None:
    """The conditions of Karush, Kuhn and Tucker: raising a column gains nothing, and those in use have no slope."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        matrix = rng.lognormal(0, 3, (rng.integers(2, 30), 7)) * (rng.random(7) < 0.9)
        solution = _non_negative(matrix)
        gradient = matrix.T @ (1 - matrix @ solution) / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
        assert (solution >= 0).all()
        assert (gradient < 1e-6).all()
        assert (np.abs(gradient[solution > 0]) < 1e-6).all()
