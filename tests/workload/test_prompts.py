from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.workload.prompts import ORDINARY_IDS, prompt_ids, prompt_text
from flowprefill_sglang.workload.trace import TraceRequest, scale_lengths


def row(tokens: int, hash_ids: tuple[int, ...] = (), block: float = 16) -> TraceRequest:
    return TraceRequest(
        arrival_s=0, input_tokens=tokens, output_tokens=1, hash_ids=hash_ids, hash_block_tokens=block if hash_ids else 0
    )


rows = st.builds(row, st.integers(1, 400), st.lists(st.integers(0, 5), max_size=30).map(tuple), st.floats(0.5, 40))


@given(rows, st.integers(0, 5))
def test_a_prompt_has_exactly_the_tokens_that_the_trace_says(request: TraceRequest, seed: int) -> None:
    text = prompt_text(request, 3, seed)
    assert len(text.encode()) + 1 == request.input_tokens
    ids = prompt_ids(request, 3, seed)
    assert len(ids) == request.input_tokens
    assert all(i in ORDINARY_IDS for i in ids)
    assert text == prompt_text(request, 3, seed)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.floats(0.05, 1.5), st.integers(1, 200))
def test_equal_leading_blocks_give_equal_prefixes(shared: list[int], factor: float, tail: int) -> None:
    one = row(16 * len(shared) + tail, (*shared, 100))
    two = row(16 * len(shared) + tail + 5, (*shared, 200))
    first, second = scale_lengths([one, two], factor)
    common = min(round(len(shared) * first.hash_block_tokens), first.input_tokens, second.input_tokens)
    assert prompt_text(first, 0, 1)[: common - 1] == prompt_text(second, 1, 1)[: common - 1]
    assert prompt_ids(first, 0, 1)[:common] == prompt_ids(second, 1, 1)[:common]


def test_prompts_that_share_nothing_share_no_prefix() -> None:
    plain = row(200)
    texts = {prompt_text(plain, number, seed)[:16] for number in range(20) for seed in range(3)}
    assert len(texts) == 60
    assert prompt_text(row(64, (1, 2, 3, 4)), 0, 0)[:16] != prompt_text(row(64, (5, 2, 3, 4)), 0, 0)[:16]


def test_a_partial_last_block_and_missing_ids() -> None:
    whole = row(32, (1, 2))
    assert prompt_text(whole, 0, 0).startswith(prompt_text(replace(whole, input_tokens=20), 0, 0))
    longer = row(100, (1, 2))
    assert prompt_text(longer, 0, 0)[:31] == prompt_text(longer, 1, 0)[:31]
    assert prompt_text(longer, 0, 0)[32:] != prompt_text(longer, 1, 0)[32:]
