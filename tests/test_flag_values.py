from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from flowprefill_sglang.flag_values import count, factor, factors, positive_seconds, seconds, share, whole


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (count, "3", 3),
        (factor, "0.5", 0.5),
        (seconds, "0", 0.0),
        (positive_seconds, "1e-3", 0.001),
        (whole, "0", 0),
        (share, "0.9", 0.9),
        (factors, "2,0.5,2", (0.5, 2.0)),
    ],
)
def test_values(kind: Callable[[str], object], text: str, value: object) -> None:
    assert kind(text) == value
    assert type(kind(text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (count, ("0", "-1", "2.5", "2.0", "1e3", "+2", "inf", "nan", "many", "")),
        (factor, ("0", "-1", "inf", "nan", "x")),
        (seconds, ("-0.1", "inf", "nan", "soon")),
        (positive_seconds, ("0", "-1", "inf", "nan", "soon")),
        (whole, ("-1", "1.0", "")),
        (share, ("0", "1", "90", "nan")),
        (factors, ("", "1,", "1;2", "1,0")),
    ],
)
def test_what_is_refused(kind: Callable[[str], float], texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a .*got"):
            kind(text)
