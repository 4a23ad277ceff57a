from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.formats.rows import BadRow

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
)
MOONCAKE = (
    '{"timestamp": 500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
    '{"timestamp": 27482, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
)
QWEN = (
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, "output_length": 132, '
    '"type": "text", "turn": 1, "hash_ids": [1089, 1090]}\n'
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 61.0, "input_length": 40, "output_length": 0, '
    '"type": "search", "turn": 2, "hash_ids": [3]}\n'
)
SAMPLES = {"azure": AZURE, "mooncake": MOONCAKE, "qwen": QWEN}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(text.encode())
    return path


def test_azure(tmp_path: Path) -> None:
    trace = load_trace(written(tmp_path, AZURE), "azure")
    first, second = trace.requests
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert trace.sha256 == hashlib.sha256(AZURE.encode()).hexdigest()


def test_azure_of_2024_has_a_time_zone(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01.009930+02:00,2399,6\n"
    trace = load_trace(written(tmp_path, rows), "azure")
    assert [r.arrival_s for r in trace.requests] == [0, pytest.approx(1)]


def test_mooncake(tmp_path: Path) -> None:
    first, second = load_trace(written(tmp_path, MOONCAKE), "mooncake").requests
    assert second.arrival_s == pytest.approx(26.982)
    assert (first.hash_ids, first.hash_block_tokens) == ((0, 7), 512)


def test_qwen_rows_are_put_in_order_and_keep_their_type(tmp_path: Path) -> None:
    first, second = load_trace(written(tmp_path, QWEN), "qwen").requests
    assert (first.class_name, second.class_name) == ("search", "text")
    assert second.arrival_s == pytest.approx(0.114)
    assert (second.hash_ids, second.hash_block_tokens) == ((1089, 1090), 16)


BROKEN = {
    "azure": [
        "1,2",
        "yesterday,1,2",
        "2023-11-16 18:15:46,-1,2",
        "2023-11-16 18:15:46,1,2.5",
        "2023-11-16 18:15:46,0,2",
    ],
    "mooncake": [
        "{",
        "[]",
        '{"timestamp": 0, "input_length": 1}',
        '{"timestamp": -1, "input_length": 1, "output_length": 1}',
    ],
    "qwen": [
        '{"timestamp": 0, "input_length": 0, "output_length": 1}',
        '{"timestamp": 0, "input_length": "9", "output_length": 1}',
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in BROKEN.items() for row in rows])
def test_a_broken_row_is_named_by_file_and_line_or_counted(tmp_path: Path, name: str, row: str) -> None:
    lines = SAMPLES[name].splitlines()
    path = written(tmp_path, "\n".join([*lines[:-1], "", row, lines[-1]]))
    with pytest.raises(BadInput) as caught:
        load_trace(path, name)
    assert str(caught.value).startswith(f"{path}:{len(lines) + 1}: ")
    trace = load_trace(path, name, skip_bad_rows=True)
    assert trace.skipped_rows == 1
    assert trace.requests == load_trace(written(tmp_path, SAMPLES[name]), name).requests


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(line=st.text())
def test_any_line_is_a_request_or_a_bad_row(name: str, line: str) -> None:
    try:
        row = FORMATS[name](line)
    except BadRow:
        return
    assert row is None or row.input_tokens >= 1


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_trace(tmp_path / "absent", "azure")
    with pytest.raises(BadInput, match="no request in this trace"):
        load_trace(written(tmp_path, AZURE.splitlines()[0]), "azure")
    with pytest.raises(BadInput, match="expected one of azure, custom, mooncake, openai, qwen, sharegpt"):
        load_trace(tmp_path, "csv")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(BadInput, match=":1: "):
        load_trace(binary, "mooncake")


def published(name: str) -> Path:
    repository = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("FLOWPREFILL_TRACES", repository.parent / "shared" / "traces"))
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set FLOWPREFILL_TRACES to a folder that has the published traces")
    return folder / name


@pytest.mark.parametrize(
    ("file", "name", "count", "span_s", "longest"),
    [
        ("azure_llm_conv_2023.csv", "azure", 19_366, 3_501.7, 14_050),
        ("mooncake_conversation.jsonl", "mooncake", 12_031, 3_537.0, 126_195),
    ],
)
def test_the_published_traces(file: str, name: str, count: int, span_s: float, longest: int) -> None:
    trace = load_trace(published(file), name)
    assert len(trace.requests) == count
    assert trace.requests[-1].arrival_s == pytest.approx(span_s, abs=0.1)
    assert max(r.input_tokens for r in trace.requests) == longest
    assert trace.skipped_rows == 0
    for request in trace.requests:
        assert len(request.hash_ids) * request.hash_block_tokens - request.input_tokens < 512
