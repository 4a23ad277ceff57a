"""Merging prompt logprobs, on answers recorded from SGLang's two sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.router.merge import LogprobMerger, prompt_tokens

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> tuple[bytes, bytes]:
    """The prefill side's answer and the decode side's."""
    document = json.loads((RECORDED / f"{name}.json").read_text())
    return document["prefill"].encode(), document["decode"].encode()


def merged(name: str) -> Any:
    prefill, decode = recorded(name)
    return json.loads(LogprobMerger(prefill).whole(decode))


def events(stream: bytes) -> list[Any]:
    return [json.loads(event[5:]) for event in stream.split(b"\n\n") if event and not event.endswith(b"[DONE]")]


def test_generate() -> None:
    prefill, decode = recorded("generate")
    before, meta = json.loads(decode)["meta_info"], merged("generate")["meta_info"]
    assert before["input_token_logprobs"] == []
    assert [token for _, _, token in meta["input_token_logprobs"]] == ["<bos>", *"hello"]
    assert len(meta["input_top_logprobs"]) == len(meta["input_token_ids_logprobs"]) == 6
    assert meta["input_top_logprobs"] == json.loads(prefill)["meta_info"]["input_top_logprobs"]
    for name, value in before.items():
        if not name.startswith("input_"):
            assert meta[name] == value, name


def test_a_batch_is_merged_prompt_by_prompt() -> None:
    first, second = (item["meta_info"]["input_token_logprobs"] for item in merged("generate_batch"))
    assert [token for _, token, _ in first] == list(b"ab")
    assert [token for _, token, _ in second] == list(b"cde")


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 10_000])
@pytest.mark.parametrize("name", ["generate_stream", "generate_batch_stream"])
def test_streams_in_any_pieces(name: str, piece_bytes: int) -> None:
    prefill, decode = recorded(name)
    merger = LogprobMerger(prefill)
    stream = b"".join(merger.events(decode[at : at + piece_bytes]) for at in range(0, len(decode), piece_bytes))
    assert merger.end() == b""
    assert stream.endswith(b"data: [DONE]\n\n")
    for before, after in zip(events(decode), events(stream), strict=True):
        tokens = [token for _, token, _ in after["meta_info"].pop("input_token_logprobs")]
        expected = list(b"hello") if name == "generate_stream" else [list(b"ab"), list(b"cde")][after["index"]]
        assert tokens == [256, *expected]
        assert before["meta_info"].pop("input_token_logprobs") == []
        assert after == before


def test_completions_with_echo() -> None:
    _, decode = recorded("completions_echo")
    before, after = json.loads(decode)["choices"][0]["logprobs"], merged("completions_echo")["choices"][0]["logprobs"]
    assert after["tokens"] == ["<bos>", *"hello", *before["tokens"]]
    assert {len(values) for values in after.values()} == {9}
    assert after["token_logprobs"][6:] == before["token_logprobs"]


def test_completions_with_echo_as_a_batch() -> None:
    choices = merged("completions_echo_batch")["choices"]
    assert ["".join(choice["logprobs"]["tokens"][:-3]) for choice in choices] == ["<bos>ab", "<bos>cde"]


def test_completions_with_echo_as_a_stream() -> None:
    prefill, decode = recorded("completions_echo_stream")
    before, after = events(decode), events(LogprobMerger(prefill).events(decode))
    tokens = [event["choices"][0]["logprobs"]["tokens"] for event in after]
    assert tokens[0][:6] == ["<bos>", *"hello"]
    assert after[1:] == before[1:]


def test_answers_that_are_no_json() -> None:
    prefill, decode = recorded("generate")
    with pytest.raises(PeerFault):
        LogprobMerger(b"oops")
    with pytest.raises(PeerFault):
        LogprobMerger(prefill).whole(decode[:-1])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("generate", 6), ("generate_batch", 7), ("generate_stream", 6), ("completions_echo", 6)],
)
def test_prompt_tokens(name: str, tokens: int) -> None:
    assert prompt_tokens(recorded(name)[0]) == tokens


def test_prompt_tokens_of_something_else() -> None:
    assert prompt_tokens(b"oops") == prompt_tokens(b"[]") == prompt_tokens(b"{}") == 0
