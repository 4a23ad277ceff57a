"""Loaders for published trace formats, one module a format; ``load_trace`` is the way in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.formats import azure, conversations, mooncake, qwen
from flowprefill_sglang.workload.formats.conversations import TokenCounter, tokens_by_characters
from flowprefill_sglang.workload.formats.rows import BadRow, LeftOut
from flowprefill_sglang.workload.trace import Trace, TraceRequest, window

RowParser = Callable[[str], TraceRequest | None]
"""One row of a file -> its request, with ``arrival_s`` on the file's own clock; None for a header. Raises BadRow."""


class TextParser(Protocol):
    """As ``RowParser``, for rows that hold texts."""

    def __call__(self, row: str, count_tokens: TokenCounter) -> TraceRequest: ...


TEXT_FORMATS: dict[str, TextParser] = {
    "custom": conversations.parse_conversation,
    "openai": conversations.parse_openai,
    "sharegpt": conversations.parse_conversation,
}
"""Formats of texts rather than of traffic: no arrival times, and lengths that a tokenizer decides."""
FORMATS: dict[str, RowParser] = {
    "azure": azure.parse_row,
    "mooncake": mooncake.parse_row,
    "qwen": qwen.parse_row,
    **{name: partial(parse, count_tokens=tokens_by_characters) for name, parse in TEXT_FORMATS.items()},
}
COARSE_TIMES = frozenset({"mooncake"})
"""Formats whose arrivals are known to a few seconds only: see ``trace.spread_ties``."""


def load_trace(
    path: Path, format_name: str, *, skip_bad_rows: bool = False, count_tokens: TokenCounter = tokens_by_characters
) -> Trace:
    """Read a trace file: requests in order of arrival, the first at 0 s.

    ``count_tokens`` measures the texts of formats that hold texts. Raises BadInput for a file that cannot be read or
    holds no request, and for a broken row, named by file and line, unless ``skip_bad_rows`` asks for those to be
    counted and left out.
    """
    if format_name not in FORMATS:
        raise BadInput(f"unknown trace format {format_name!r}: expected one of {', '.join(sorted(FORMATS))}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: the trace cannot be read: {error.strerror}") from error
    parse = FORMATS[format_name]
    if format_name in TEXT_FORMATS:
        parse = partial(TEXT_FORMATS[format_name], count_tokens=count_tokens)
    rows, skipped, left_out = [], 0, 0
    for number, text in _rows(path, data, format_name):
        try:
            row = parse(text.decode("utf-8") if isinstance(text, bytes) else text)
        except LeftOut:
            left_out += 1
            continue
        except (BadRow, UnicodeDecodeError) as error:
            if not skip_bad_rows:
                raise BadInput(f"{path}:{number}: {error} (--skip-bad-rows leaves such rows out)") from error
            skipped += 1
            continue
        if row is not None:
            rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no request in this trace ({skipped} broken rows)")
    return Trace(
        name=path.name,
        requests=_from_zero(rows),
        sha256=hashlib.sha256(data).hexdigest(),
        skipped_rows=skipped,
        left_out_rows=left_out,
        has_arrivals=format_name not in TEXT_FORMATS,
    )


def _rows(path: Path, data: bytes, format_name: str) -> Iterator[tuple[int, bytes | str]]:
    if format_name != "sharegpt":
        yield from _lines(data)
        return
    try:
        yield from conversations.array_rows(data)
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise BadInput(f"{path}:{line}: not UTF-8") from error
    except BadRow as error:
        what, line = error.args
        raise BadInput(f"{path}:{line}: {what}") from error


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield number, line


def _from_zero(rows: list[TraceRequest]) -> tuple[TraceRequest, ...]:
    rows.sort(key=lambda r: r.arrival_s)  # stable: equal arrivals stay in the file's order
    return window(rows, rows[0].arrival_s, None)
