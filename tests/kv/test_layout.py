"""Layouts, spans and their coverage."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.kv.layout import Coverage, Layout, Span, largest_chunk_bytes, layout_mismatch, plan_spans

LAYOUT = Layout(
    page_tokens=16,
    dtype="bfloat16",
    kv_layout=None,
    page_bytes=(64, 64),
    layer_ids=(0, 0),
    aux_bytes=(64, 8),
    attn_tp_size=1,
    attn_tp_rank=0,
)

page_bytes_lists = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(page_bytes_lists, st.integers(0, 40), st.integers(0, 5), st.integers(1, 300))
def test_spans_cover_every_page_of_every_buffer_once_within_the_bound(
    page_bytes: list[int], pages: int, first_page: int, chunk_bytes: int
) -> None:
    spans = list(plan_spans(page_bytes, first_page=first_page, pages=pages, chunk_bytes=chunk_bytes))
    covered = [
        (page, buffer)
        for span in spans
        for page in range(span.first_page, span.first_page + span.pages)
        for buffer in range(span.first_buffer, span.first_buffer + span.buffers)
    ]
    assert sorted(covered) == [(p, b) for p in range(first_page, first_page + pages) for b in range(len(page_bytes))]
    assert all(span.size_bytes(page_bytes) <= largest_chunk_bytes(page_bytes, chunk_bytes) for span in spans)


@given(page_bytes_lists, st.lists(st.integers(0, 20), max_size=4), st.integers(1, 300))
def test_coverage_takes_the_planned_spans_and_is_complete_only_at_the_end(
    page_bytes: list[int], runs: list[int], chunk_bytes: int
) -> None:
    coverage = Coverage(pages=sum(runs), buffers=len(page_bytes))
    first_page = 0
    spans = []
    for run in runs:
        spans += plan_spans(page_bytes, first_page=first_page, pages=run, chunk_bytes=chunk_bytes)
        first_page += run
    for span in spans:
        assert not coverage.is_complete
        assert coverage.try_add(span) is None
    assert coverage.is_complete


small = st.integers(-1, 4)


@given(st.lists(st.builds(Span, small, small, small, small), max_size=12))
def test_coverage_never_takes_a_part_twice_or_outside(spans: list[Span]) -> None:
    coverage = Coverage(pages=3, buffers=2)
    taken: list[tuple[int, int]] = []
    for span in spans:
        if coverage.try_add(span) is None:
            taken += [
                (page, buffer)
                for page in range(span.first_page, span.first_page + span.pages)
                for buffer in range(span.first_buffer, span.first_buffer + span.buffers)
            ]
    assert len(taken) == len(set(taken))
    assert set(taken) <= {(page, buffer) for page in range(3) for buffer in range(2)}
    assert coverage.is_complete == (len(taken) == 6)


def test_equal_layouts_match() -> None:
    assert layout_mismatch(prefill=LAYOUT, decode=LAYOUT) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"page_tokens": 1}, "--page-size"),
        ({"dtype": "float16"}, "--kv-cache-dtype"),
        ({"page_bytes": (64, 32)}, "same model"),
        ({"aux_bytes": (64,)}, "SGLang version"),
        ({"attn_tp_size": 2, "page_bytes": (32, 32)}, "tensor parallelism, or the mooncake"),
    ],
)
def test_a_mismatch_says_what_differs_and_what_to_do(changes: dict[str, object], expected: str) -> None:
    other = msgspec.structs.replace(LAYOUT, **changes)
    sentence = layout_mismatch(prefill=LAYOUT, decode=other)
    assert sentence is not None
    assert expected in sentence
    assert next(iter(changes)) in sentence
