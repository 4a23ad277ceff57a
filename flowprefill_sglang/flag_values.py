"""Types of command-line flags, for ``argparse``: each turns a flag's text into a value, or says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def count(text: str) -> int:
    """A whole number of at least 1, in digits alone."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0, in digits alone."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and below 1."""
    return number(text, "a number above 0 and below 1", lambda v: 0 < v < 1)


def factors(text: str) -> tuple[float, ...]:
    """Finite numbers above 0 with commas between them, put in order."""
    return tuple(sorted({factor(part) for part in text.split(",")}))


def factor(text: str) -> float:
    """A finite number above 0."""
    return number(text, "a number above 0", lambda v: v > 0)


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more."""
    return number(text, "a number of seconds, 0 or more", lambda v: v >= 0)


def positive_seconds(text: str) -> float:
    """A finite number of seconds above 0."""
    return number(text, "a number of seconds above 0", lambda v: v > 0)


def milliseconds(text: str) -> float:
    """A finite number of milliseconds, 0 or more."""
    return number(text, "a number of milliseconds, 0 or more", lambda v: v >= 0)


def number(text: str, expected: str, is_right: Callable[[float], bool]) -> float:
    """A finite number for which ``is_right`` holds; ``expected`` says which those are, for the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_right(value)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
