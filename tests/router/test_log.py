"""Log lines."""

from __future__ import annotations

import json
import logging

from flowprefill_sglang.router.log import FIELDS, JsonLines, PlainLines


def record(**fields: object) -> logging.LogRecord:
    one = logging.LogRecord("x", logging.INFO, "f", 1, "worker_state", (), None)
    one.created, one.msecs = 0.0, 5.0
    setattr(one, FIELDS, fields)
    return one


def test_plain() -> None:
    line = PlainLines().format(record(worker="p0", reason="no answer\nfor long", count=3, empty=""))
    assert line == (
        '1970-01-01T00:00:00.005Z INFO worker_state worker=p0 reason="no answer\\nfor long" count=3 empty=""'
    )


def test_json() -> None:
    assert json.loads(JsonLines().format(record(worker="p 0", count=3, ratio=0.5, flag=True))) == {
        "time": "1970-01-01T00:00:00.005Z",
        "level": "INFO",
        "event": "worker_state",
        "worker": "p 0",
        "count": 3,
        "ratio": 0.5,
        "flag": True,
    }
