"""The PD wire fields, and what the router reads of a body."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.objectives import NOTHING_ASKED
from flowprefill_sglang.router.pd_fields import MAX_BATCH, ParsedRequest, parse, rids, with_pd_fields

OWN = ("rid", "bootstrap_host", "bootstrap_port", "bootstrap_room")


def read(body: dict[str, Any], path: str = "/generate") -> ParsedRequest:
    return parse(path, json.dumps(body).encode())


def sent(body: dict[str, Any], path: str = "/generate", priority: int | None = None) -> dict[str, Any]:
    request = read(body, path)
    rooms = itertools.count(100)
    raw = with_pd_fields(
        request, rids(request, "own"), host="h", port=7, new_room=lambda: next(rooms), priority=priority
    )
    pairs = json.loads(raw, object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs), "a key twice: which one counts depends on the parser"
    return {key: dict(value) if _is_object(value) else value for key, value in pairs}


def _is_object(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, tuple) for one in value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.dictionaries(st.text().filter(lambda key: key not in ("n", "sampling_params")), json_values, max_size=5))
def test_everything_else_passes_through(extra: dict[str, Any]) -> None:
    body = {key: value for key, value in extra.items() if key not in ("model", "rid", "text", "input_ids")} | {
        "text": "x"
    }
    result = sent(body)
    for key in OWN:
        body.pop(key, None)
        assert key in result
    assert {key: value for key, value in result.items() if key not in OWN} == body


def test_single() -> None:
    expected = {"rid": "own", "bootstrap_host": "h", "bootstrap_port": 7, "bootstrap_room": 100, "text": "x"}
    assert sent({"text": "x"}) == expected
    assert sent({"text": "x", "bootstrap_room": 5, "bootstrap_host": "evil"}) == expected
    assert sent({})["rid"] == "own"
    assert sent({"text": "x", "rid": "mine"})["rid"] == "mine"


@pytest.mark.parametrize(
    ("body", "path", "batch"),
    [
        ({"text": ["a"]}, "/generate", 1),
        ({"text": ["a", "b"]}, "/generate", 2),
        ({"input_ids": [1, 2]}, "/generate", None),
        ({"input_ids": [[1], [2, 3]]}, "/generate", 2),
        ({"text": None, "input_ids": [[1]]}, "/generate", 1),
        ({"prompt": ["a", "b", "c"]}, "/v1/completions", 3),
        ({"prompt": [1, 2, 3]}, "/v1/completions", None),
        ({"messages": [{"role": "user", "content": "x"}] * 3}, "/v1/chat/completions", None),
        ({"text": []}, "/generate", None),
    ],
)
def test_batches(body: dict[str, Any], path: str, batch: int | None) -> None:
    assert read(body, path).batch == batch
    result = sent(body, path)
    if batch is None:
        assert isinstance(result["bootstrap_room"], int)
    else:
        assert result["rid"] == [f"own_{index}" for index in range(batch)]
        assert result["bootstrap_room"] == list(range(100, 100 + batch))
        assert result["bootstrap_host"] == ["h"] * batch


def test_the_fields_of_the_terms_stay_in_the_body_and_are_shown_undecoded() -> None:
    body = {"text": "x", "ttft_slo_ms": 250, "service_tier": "te\u0078t", "priority": -3}
    assert {key: value for key, value in sent(body).items() if key not in OWN} == body
    terms = read(body).terms
    assert (terms.ttft_slo_ms, terms.service_tier, terms.priority) == (b"250", b'"text"', b"-3")
    assert read({"text": "x"}).terms is NOTHING_ASKED


@pytest.mark.parametrize("body", [{"text": "x"}, {"text": "x", "priority": 1}, {"text": ["x", "y"], "priority": None}])
def test_a_headers_priority_takes_the_bodys_place(body: dict[str, Any]) -> None:
    assert sent(body, priority=7)["priority"] == 7
    assert sent(body).get("priority") == body.get("priority")


def test_several_samples_become_a_batch_with_a_room_each() -> None:
    result = sent({"text": "x", "sampling_params": {"n": 3, "temperature": 1}})
    assert result["text"] == ["x", "x", "x"]
    assert result["bootstrap_room"] == [100, 101, 102]
    assert result["sampling_params"] == {"temperature": 1}
    result = sent({"prompt": ["x", "y"], "n": 2}, "/v1/completions")
    assert result["prompt"] == ["x", "x", "y", "y"]
    assert "n" not in result
    assert len(result["rid"]) == 4


def test_several_samples_of_a_chat_are_refused() -> None:
    with pytest.raises(BadInput, match="n > 1"):
        read({"messages": [], "n": 2}, "/v1/chat/completions")
    assert read({"messages": [], "n": 1}, "/v1/chat/completions").batch is None


def test_lengths() -> None:
    assert read({"input_ids": [5] * 40}).exact_tokens == 40
    assert read({"input_ids": [[5], [5] * 9]}).exact_tokens == 9
    assert read({"text": "x" * 98}).exact_tokens is None
    assert read({"text": "x" * 98}).prompt_bytes == 100


def test_when_prompt_logprobs_are_needed() -> None:
    assert read({"text": "x", "return_logprob": True}).merges_logprobs
    assert read({"text": ["x", "y"], "return_logprob": [False, True]}).merges_logprobs
    assert not read({"text": "x", "return_logprob": False}).merges_logprobs
    assert read({"prompt": "x", "echo": True, "logprobs": 1}, "/v1/completions").merges_logprobs
    assert not read({"prompt": "x", "logprobs": 1}, "/v1/completions").merges_logprobs


def test_a_single_prompts_stream_needs_no_prefill_side_any_more() -> None:
    assert not read({"text": "x"}).needs_prefill_while_streaming
    assert not read({"messages": []}, "/v1/chat/completions").needs_prefill_while_streaming
    assert read({"text": ["x", "y"]}).needs_prefill_while_streaming
    assert read({"text": "x", "sampling_params": {"n": 2}}).needs_prefill_while_streaming
    assert read({"text": "x", "return_logprob": True}).needs_prefill_while_streaming


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b'{"text": "x"} x', b'{"rid": 5}', b'{"model": []}', b'{"text": "\xff"}'],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(BadInput):
        parse("/generate", body)


def test_rids_must_fit_the_batch() -> None:
    assert rids(read({"text": ["a", "b"], "rid": ["1", "2"]}), "own") == ["1", "2"]
    for wrong in (["1"], ["1", "1"], ["1", ""]):
        with pytest.raises(BadInput, match="rid"):
            read({"text": ["a", "b"], "rid": wrong})


def test_a_batch_has_a_limit() -> None:
    with pytest.raises(BadInput, match="at most"):
        read({"text": "x", "sampling_params": {"n": MAX_BATCH + 1}})
