"""Qwen-Bailian traces (alibaba-edu/qwen-bailian-usagetraces-anon, JSON lines, Apache 2.0), the paper's own.

``chat_id``, ``parent_chat_id``, ``timestamp`` in seconds, ``input_length``, ``output_length``, ``type`` (text, search,
image, file; the to-B, coder and thinking traces may say otherwise), ``turn``, and ``hash_ids``, one for each block of
16 prompt tokens. The chat fields are not needed here: a turn's prompt repeats its parent's hash ids.
"""

from __future__ import annotations

import msgspec

from flowprefill_sglang.workload.formats.rows import Count, PositiveCount, Seconds, decode_json
from flowprefill_sglang.workload.trace import TraceRequest

BLOCK_TOKENS = 16


class _Row(msgspec.Struct, frozen=True):
    timestamp: Seconds
    input_length: PositiveCount
    output_length: Count
    type: str = ""
    hash_ids: tuple[int, ...] = ()


_decoder = msgspec.json.Decoder(_Row)


def parse_row(line: str) -> TraceRequest:
    """One line. Raises BadRow."""
    row = decode_json(_decoder, line)
    return TraceRequest(
        arrival_s=row.timestamp,
        input_tokens=row.input_length,
        output_tokens=row.output_length,
        class_name=row.type,
        hash_ids=row.hash_ids,
        hash_block_tokens=BLOCK_TOKENS,
    )
