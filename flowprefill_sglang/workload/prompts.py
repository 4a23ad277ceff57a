"""Prompts for trace rows: traces carry lengths, so the content is made up, the same for a seed.

Equal hash ids give equal content, so that prefix caches see the trace's real reuse; all other content is unique to its
row, so that they see no other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from flowprefill_sglang.workload.trace import TraceRequest

LETTERS = "abcdefghijklmnopqrstuvwxyz      "
"""One byte each, so one token each for the generated model's byte-level tokenizer; about one in six is a space."""
ORDINARY_IDS = range(1_000, 8_000)
"""Token ids that are plain text in every tokenizer of a real model."""

Symbol = TypeVar("Symbol", str, int)


def prompt_text(request: TraceRequest, row: int, seed: int) -> str:
    """ASCII text that a byte-level tokenizer turns into ``input_tokens`` tokens, ``<bos>`` counted.

    ``row`` tells rows without hash ids apart.
    """
    return "".join(_content(request, row, seed, LETTERS)[: request.input_tokens - 1])


def prompt_ids(request: TraceRequest, row: int, seed: int) -> list[int]:
    """``input_tokens`` token ids, for models with any tokenizer of more than 8,000 entries."""
    return _content(request, row, seed, ORDINARY_IDS)


def _content(request: TraceRequest, row: int, seed: int, symbols: Sequence[Symbol]) -> list[Symbol]:
    content: list[Symbol] = []
    for i, hash_id in enumerate(request.hash_ids):
        end = min(round((i + 1) * request.hash_block_tokens), request.input_tokens)
        content += random.Random(f"{seed} block {hash_id}").choices(symbols, k=max(0, end - len(content)))
    missing = request.input_tokens - len(content)
    return content + random.Random(f"{seed} row {row}").choices(symbols, k=missing)
