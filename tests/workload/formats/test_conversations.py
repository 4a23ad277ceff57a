"""SGLang's own dataset files: conversations without times, measured in tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.formats import load_trace
from flowprefill_sglang.workload.formats.conversations import array_rows


def talk(*texts: str, key: str = "value") -> dict[str, object]:
    return {"conversations": [{"from": "human", key: text} for text in texts]}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "dataset.json"
    path.write_text(text)
    return path


def test_sharegpt_counts_the_first_two_turns(tmp_path: Path) -> None:
    rows = [talk("a" * 400, "b" * 80, "ignored" * 99), talk("alone"), talk("a" * 40, "x"), talk("c" * 20, "d" * 20)]
    trace = load_trace(written(tmp_path, json.dumps(rows, indent=1)), "sharegpt")
    assert [(r.input_tokens, r.output_tokens) for r in trace.requests] == [(100, 20), (5, 5)]
    assert (trace.left_out_rows, trace.skipped_rows, trace.has_arrivals) == (2, 0, False)


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([talk("one two three", "four five")]))
    (request,) = load_trace(path, "sharegpt", count_tokens=lambda text: len(text.split())).requests
    assert (request.input_tokens, request.output_tokens) == (3, 2)


def test_custom_has_a_conversation_a_line(tmp_path: Path) -> None:
    lines = [
        json.dumps(talk("a" * 40, "b" * 40, key="content")),
        json.dumps({"conversation": talk("a" * 8, "b" * 8)["conversations"]}),
    ]
    trace = load_trace(written(tmp_path, "\n".join(lines)), "custom")
    assert [r.input_tokens for r in trace.requests] == [10, 2]


def test_openai_requests(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a" * 40}, {"type": "image_url", "image_url": {"url": "x"}}]
    lines = [
        {"messages": [{"role": "system", "content": "s" * 40}, {"role": "user", "content": parts}], "max_tokens": 7},
        {"messages": [{"role": "user", "content": "a" * 40}]},
    ]
    trace = load_trace(written(tmp_path, "\n".join(map(json.dumps, lines))), "openai")
    assert [(r.input_tokens, r.output_tokens) for r in trace.requests] == [(20, 7), (10, 256)]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ('[\n{"conversations": []},\n\n{"conversations": 5}]', 4, "Expected `array"),
        ('[\n{"id": 1}]', 2, "expected `conversations`"),
        ('[\n{"conversations": []}\n{"conversations": []}]', 3, "expected ','"),
        ("{}", 1, r"expected '\['"),
        ("[\n{]", 2, "not JSON"),
        ("", 1, r"expected '\['"),
        ("[\n", 2, "not JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput, match=expected) as caught:
        load_trace(path, "sharegpt")
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_a_broken_conversation_is_counted_when_asked(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([{"id": 1}, talk("a" * 40, "b" * 40)]))
    assert load_trace(path, "sharegpt", skip_bad_rows=True).skipped_rows == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1, 4]))
def test_the_elements_of_any_array(values: list[object], indent: int | None) -> None:
    rows = list(array_rows(json.dumps(values, indent=indent).encode()))
    assert [json.loads(text) for _, text in rows] == values
    lines = [line for line, _ in rows]
    assert lines == sorted(lines)
