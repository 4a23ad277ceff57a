"""What counts as a whole answer. The events are those that SGLang 0.5.23 sends."""

from __future__ import annotations

import json

import pytest

from flowprefill_sglang.bench.endpoints import ENDPOINTS, AnswerReader


def generate(text: str, tokens: int, reason: dict[str, object] | None = None) -> dict[str, object]:
    return {"text": text, "meta_info": {"completion_tokens": tokens, "finish_reason": reason}}


def completion(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}], "usage": None}


USAGE = {"choices": [], "usage": {"completion_tokens": 2}}
LENGTH = {"type": "length", "length": 2}


def read(name: str, *events: object) -> AnswerReader:
    reader = AnswerReader(ENDPOINTS[name], expected_tokens=2)
    for event in events:
        reader.read(event if isinstance(event, bytes) else json.dumps(event).encode())
    return reader


def test_whole_answers() -> None:
    cumulative = read("generate", generate("l", 1), generate("l#", 2, LENGTH), b"[DONE]")
    deltas = read("completions", completion("["), completion(".", "length"), USAGE, b"[DONE]")
    for reader in (cumulative, deltas):
        assert reader.error() is None
        assert (len(reader.text), reader.output_tokens) == (2, 2)


def test_a_token_without_text_is_a_token() -> None:
    assert read("generate", generate("", 1)).has_token  # half of a UTF-8 sequence
    assert not read("generate", {"text": "", "meta_info": {}}).has_token


@pytest.mark.parametrize(
    ("name", "events", "expected"),
    [
        ("generate", [generate("l", 1)], "before [DONE]"),
        ("generate", [b"[DONE]"], "no token"),
        ("generate", [generate("l", 1, {"type": "stop"}), b"[DONE]"], "1 tokens instead of 2 (finish: stop)"),
        ("generate", [generate("", 0, {"type": "abort", "message": "out of memory"}), b"[DONE]"], "out of memory"),
        ("generate", [{"error": {"message": "prefill failed", "code": 502}}, b"[DONE]"], "prefill failed"),
        ("generate", [b"<html>"], "not what /generate sends"),
        ("generate", [b"[1]"], "not what /generate sends"),
        ("generate", [{"meta_info": 3}], "not what /generate sends"),
        ("completions", [completion("a", "abort"), USAGE, b"[DONE]"], "aborted"),
        ("completions", [{"error": "busy"}, b"[DONE]"], "busy"),
        ("completions", [{"choices": [3]}], "not what /v1/completions sends"),
    ],
)
def test_answers_that_are_no_success(name: str, events: list[object], expected: str) -> None:
    assert expected in (read(name, *events).error() or "")
