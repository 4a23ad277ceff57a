"""Loaders for published trace formats, one module a format; ``load_trace`` is the way in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.formats import azure, mooncake, qwen
from flowprefill_sglang.workload.formats.rows import BadRow
from flowprefill_sglang.workload.trace import Trace, TraceRequest, window

RowParser = Callable[[str], TraceRequest | None]
"""One line of a file -> its request, with ``arrival_s`` on the file's own clock; None for a header. Raises BadRow."""

FORMATS: dict[str, RowParser] = {
    "azure": azure.parse_row,
    "mooncake": mooncake.parse_row,
    "qwen": qwen.parse_row,
}


def load_trace(path: Path, format_name: str, *, skip_bad_rows: bool = False) -> Trace:
    """Read a trace file: requests in order of arrival, the first at 0 s.

    Raises BadInput for a file that cannot be read or holds no request, and for a broken row, named by file and line,
    unless ``skip_bad_rows`` asks for those to be counted and left out.
    """
    if format_name not in FORMATS:
        raise BadInput(f"unknown trace format {format_name!r}: expected one of {', '.join(sorted(FORMATS))}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: the trace cannot be read: {error.strerror}") from error
    parse, rows, skipped = FORMATS[format_name], [], 0
    for number, line in _lines(data):
        try:
            row = parse(line.decode("utf-8"))
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
    )


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield number, line


def _from_zero(rows: list[TraceRequest]) -> tuple[TraceRequest, ...]:
    rows.sort(key=lambda r: r.arrival_s)  # stable: equal arrivals stay in the file's order
    return window(rows, rows[0].arrival_s, None)
