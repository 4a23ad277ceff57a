"""Mooncake's traces (FAST'25 release, JSON lines, Apache 2.0).

``{"timestamp": milliseconds, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}``; one id for each
block of 512 prompt tokens, the last block may be partial. No types.
"""

from __future__ import annotations

import msgspec

from flowprefill_sglang.workload.formats.rows import Count, PositiveCount, Seconds, decode_json
from flowprefill_sglang.workload.trace import TraceRequest

BLOCK_TOKENS = 512


class _Row(msgspec.Struct, frozen=True):
    timestamp: Seconds  # in milliseconds
    input_length: PositiveCount
    output_length: Count
    hash_ids: tuple[int, ...] = ()


_decoder = msgspec.json.Decoder(_Row)


def parse_row(line: str) -> TraceRequest:
    """One line. Raises BadRow."""
    row = decode_json(_decoder, line)
    return TraceRequest(
        arrival_s=row.timestamp / 1_000,
        input_tokens=row.input_length,
        output_tokens=row.output_length,
        hash_ids=row.hash_ids,
        hash_block_tokens=BLOCK_TOKENS,
    )
