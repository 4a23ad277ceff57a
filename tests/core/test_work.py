"""Predicting tokens from bytes."""

from __future__ import annotations

import pytest

from flowprefill_sglang.core.work import INITIAL_BYTES_PER_TOKEN, TokenRatio


def test_it_learns_the_traffic() -> None:
    ratio = TokenRatio()
    assert ratio.tokens(400) == 400 / INITIAL_BYTES_PER_TOKEN
    for _ in range(200):
        ratio.observe(1000, 1000)
    assert ratio.tokens(400) == pytest.approx(400, abs=1)


def test_what_teaches_nothing() -> None:
    ratio = TokenRatio()
    ratio.observe(0, 5)
    ratio.observe(5, 0)
    assert ratio.bytes_per_token == INITIAL_BYTES_PER_TOKEN
    assert ratio.tokens(0) == 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError):
        TokenRatio(bytes_per_token=0)
