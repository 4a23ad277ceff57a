"""Where long operators are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.core.slicing import (
    GRANULE_ROWS,
    MIN_TAIL_ROWS,
    OperatorCosts,
    attention_tiles,
    key_segments,
    operator_costs,
    row_limit,
    row_slices,
    wave_rows,
)

extents = st.lists(st.builds(Extent, st.integers(1, 3000), st.integers(0, 3000)), min_size=1, max_size=5)


@given(st.integers(1, 20_000), st.sampled_from([64, 128, 192, 1024]))
def test_row_slices_cover_all_rows_once_and_none_is_long_or_tiny(rows: int, limit: int) -> None:
    slices = row_slices(rows, limit)
    assert [begin for begin, _ in slices] == [0, *(end for _, end in slices[:-1])]
    assert slices[-1][1] == rows
    assert all(end - begin < limit + MIN_TAIL_ROWS for begin, end in slices)
    assert all(begin % GRANULE_ROWS == 0 for begin, _ in slices)
    assert len(slices) == 1 or min(end - begin for begin, end in slices) >= MIN_TAIL_ROWS


def test_slices_are_even() -> None:
    assert row_slices(1030, 512) == [(0, 384), (384, 768), (768, 1030)]
    assert row_slices(512, 512) == [(0, 512)]
    assert row_slices(129, 64) == [(0, 64), (64, 129)]


@pytest.mark.parametrize(("rows", "expected"), [(3, 64), (127, 64), (128, 128), (191, 128), (192, 192), (1000, 768)])
def test_a_limit_is_rounded_down_to_a_step(rows: int, expected: int) -> None:
    assert row_limit(1e-3, rows * 1.0001e-3) == expected


def test_what_costs_nothing_has_no_limit() -> None:
    assert row_limit(0.0, 0.002) is None


@given(extents, st.floats(4096, 1e7))
def test_tiles_cover_all_rows_once_within_the_budget(batch: list[Extent], max_pairs: float) -> None:
    tiles = attention_tiles(batch, max_pairs)
    rows = [(piece.request, row) for tile in tiles for piece in tile for row in range(piece.begin, piece.end)]
    assert rows == [(index, row) for index, extent in enumerate(batch) for row in range(extent.new_tokens)]
    for tile in tiles:
        pairs = [(p.end - p.begin) * (batch[p.request].cached_tokens + p.end) for p in tile]
        tails = [MIN_TAIL_ROWS * (batch[p.request].cached_tokens + p.end) for p in tile]
        if len(tile) > 1:
            assert sum(pairs) <= max_pairs + tails[-1]
        else:
            piece = tile[0]
            assert piece.end - piece.begin < GRANULE_ROWS + MIN_TAIL_ROWS or pairs[0] <= max_pairs + 2 * tails[0]
            assert piece.key_parts == 1 or pairs[0] / piece.key_parts <= max_pairs
        assert all(piece.begin % GRANULE_ROWS == 0 for piece in tile)


def test_tiles_get_narrower_as_keys_grow_and_split_the_keys_at_last() -> None:
    tiles = attention_tiles([Extent(1024)], 64 * 512)
    widths = [tile[0].end - tile[0].begin for tile in tiles]
    assert widths[0] == 128
    assert widths == sorted(widths, reverse=True)
    assert [tile[0].key_parts for tile in tiles][-1] == 2
    assert tiles[-1][0].end == 1024


def test_short_requests_share_a_tile() -> None:
    assert [len(tile) for tile in attention_tiles([Extent(40)] * 4, 3_200)] == [2, 2]


@given(st.integers(1, 5000), st.integers(1, 9), st.sampled_from([1, 64, 512]))
def test_key_segments_cover_all_keys(keys: int, parts: int, block: int) -> None:
    segments = key_segments(keys, parts, block)
    assert [begin for begin, _ in segments] == [0, *(end for _, end in segments[:-1])]
    assert segments[-1][1] == keys
    assert len(segments) <= parts
    assert all(begin % block == 0 for begin, _ in segments)


def test_no_keys_are_no_segments() -> None:
    assert key_segments(0, 3, 512) == []


H100_PROCESSORS, H100_FLOP_S, H100_BYTE_S = 132, 1 / 400e12, 1 / 3.35e12
"""Multiprocessors; what attention kernels reach of its 989 TFLOP/s in bfloat16; memory."""
HEAD = 128
KEYS_128K = 131_072
SLICE_TARGET_S = 1e-3
"""Half of the default ``--max-blocking-ms``."""
SHAPES = {"Llama-3-8B": (32, 8), "Qwen3-14B": (40, 8), "Qwen3-30B-A3B": (32, 4)}
"""Heads of queries and of keys."""


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES.values(), ids=SHAPES)
def test_a_granule_of_rows_is_short_where_the_kernel_spreads_its_keys(heads: int, kv_heads: int) -> None:
    """Why tiles of fa3 and flashinfer are not cut by keys (docs/preemption.md)."""
    operations_s = GRANULE_ROWS * KEYS_128K * 4 * HEAD * heads * H100_FLOP_S
    memory_s = KEYS_128K * 2 * 2 * HEAD * kv_heads * H100_BYTE_S
    assert max(operations_s, memory_s) < SLICE_TARGET_S / 2


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES.values(), ids=SHAPES)
def test_keys_are_cut_where_a_block_of_rows_is_on_one_processor(heads: int, kv_heads: int) -> None:
    """Why tiles of triton are: the shortest one against all keys takes longer than the target."""
    block_s = 128 * KEYS_128K * 4 * HEAD * H100_FLOP_S * H100_PROCESSORS
    assert block_s > 2e-3
    rows, pair_s = wave_rows(H100_PROCESSORS, heads, 128), 4 * HEAD * heads * H100_FLOP_S
    assert rows * heads <= 128 * H100_PROCESSORS < (rows + 128) * heads
    tiles = attention_tiles([Extent(4 * rows, KEYS_128K - 4 * rows)], SLICE_TARGET_S / pair_s, rows)
    assert len(tiles) == 4
    for (piece,) in tiles:
        segment_s = (piece.end - piece.begin) * (KEYS_128K - 4 * rows + piece.end) * pair_s / piece.key_parts
        assert 0 < segment_s <= SLICE_TARGET_S


def test_a_few_rows_against_many_keys_are_cut_by_keys_too() -> None:
    """They take as long as a wave of rows, where a block of rows is on one processor."""
    costs = OperatorCosts(flop_s=0.0, pair_s=1e-10, least_rows=512)
    batch = [Extent(16, 100_000), Extent(16, 100), Extent(16, 100_000)]
    assert costs.attention_s(batch) == pytest.approx(512 * 100_016 * 1e-10)
    assert costs.attention_s([Extent(4096)]) == pytest.approx(0.5 * 4096**2 * 1e-10)
    tiles = attention_tiles(batch, 1e7, 512, 512)
    assert [[(p.request, p.key_parts) for p in tile] for tile in tiles] == [[(0, 6)], [(1, 1)], [(2, 6)]]
    assert [len(tile) for tile in attention_tiles(batch, 1e7, 64)] == [3]


def test_a_wave_has_at_least_one_block() -> None:
    assert wave_rows(8, 32, 128) == 128


def test_costs_of_operators_add_up_to_the_forward() -> None:
    model = CostModel(base_s=0.0, short_token_s=9.0, long_token_s=6e-5, pair_s=8e-9, cached_pair_s=4e-9)
    costs = operator_costs(model, row_flops=3e6, pair_flops=100.0, attention_layers=4)
    assert costs.flop_s * 3e6 == pytest.approx(6e-5)
    batch = [Extent(1000, 500), Extent(10)]
    whole = model.parts(batch)[2]
    assert 4 * costs.attention_s(batch) == pytest.approx(whole)


def test_attention_is_never_cheaper_than_its_operations() -> None:
    model = CostModel(base_s=0.0, short_token_s=0.0, long_token_s=1e-4, pair_s=0.0)
    costs = operator_costs(model, row_flops=1e6, pair_flops=500.0, attention_layers=2)
    assert costs.pair_s == pytest.approx(500 * costs.flop_s)
    assert costs.flop_s == pytest.approx(1e-10)
