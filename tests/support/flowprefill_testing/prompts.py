"""Prompts of exact lengths for the byte-level tiny model: one token a character, and one for ``<bos>``."""

import random


def text(tokens: int, seed: int = 0) -> str:
    """A prompt of ``tokens`` tokens when tokenised (at least 1: ``<bos>`` alone is the empty text)."""
    rng = random.Random(f"{tokens}-{seed}")
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ,.", k=tokens - 1))


def ids(tokens: int, seed: int = 0) -> list[int]:
    """The same as token ids; may be shorter than ``<bos>``: any single token is a prompt."""
    rng = random.Random(f"{tokens}-{seed}-ids")
    return [rng.randrange(0x20, 0x7F) for _ in range(tokens)]
