"""Log lines: one event a line, a name and its fields, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

FIELDS = "flowprefill_fields"
_QUOTED = set(' ="')


def event(log: logging.Logger, level: int, name: str, **fields: object) -> None:
    """Log one event. Costs next to nothing when its level is off."""
    if log.isEnabledFor(level):
        log.log(level, name, extra={FIELDS: fields})


def set_up(*, level: str, as_json: bool) -> None:
    """Print FlowPrefill's events and everybody's warnings to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("flowprefill_sglang").setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


class PlainLines(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO worker_state worker=p0 state=ready``; values with spaces are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), record.levelname, record.getMessage()]
        for name, value in getattr(record, FIELDS, {}).items():
            text = str(value)
            is_plain = text and text.isprintable() and not set(text) & _QUOTED
            parts.append(f"{name}={text if is_plain else json.dumps(text)}")
        if record.exc_info:
            parts.append("\n" + self.formatException(record.exc_info))
        return " ".join(parts)


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``event``, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname, "event": record.getMessage()}
        line |= {name: _plain(value) for name, value in getattr(record, FIELDS, {}).items()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | bool | None) else str(value)
