"""Azure LLM inference traces (Azure Public Dataset, ``AzureLLMInferenceTrace_*.csv``, 2023 and 2024, CC-BY 4.0).

CSV with the header ``TIMESTAMP,ContextTokens,GeneratedTokens``. Timestamps have seven decimals, those of 2024 a time
zone as well. No types, no prefix information.
"""

from __future__ import annotations

from datetime import UTC, datetime

from flowprefill_sglang.workload.formats.rows import BadRow
from flowprefill_sglang.workload.trace import TraceRequest

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def parse_row(line: str) -> TraceRequest | None:
    """One line; ``arrival_s`` is seconds since 1970. Raises BadRow."""
    if line.strip().lstrip("\ufeff") == HEADER:
        return None
    fields = line.strip().split(",")
    if len(fields) != 3:
        raise BadRow(f"expected {HEADER}, got {len(fields)} fields")
    try:
        arrived = datetime.fromisoformat(fields[0])
    except ValueError as error:
        raise BadRow(f"expected a timestamp like 2023-11-16 18:15:46.6805900, got {fields[0]!r}") from error
    if arrived.tzinfo is None:
        arrived = arrived.replace(tzinfo=UTC)
    return TraceRequest(
        arrival_s=arrived.timestamp(),
        input_tokens=_count("ContextTokens", fields[1], least=1),
        output_tokens=_count("GeneratedTokens", fields[2], least=0),
    )


def _count(name: str, text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= 10**9):
        raise BadRow(f"expected {name} to be a whole number from {least}, got {text!r}")
    return int(text)
