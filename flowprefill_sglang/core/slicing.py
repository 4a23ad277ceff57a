"""Where an operator that would take too long is cut, so that a prefill can be stopped inside of it.

Cuts depend on the shape of the batch and on costs that are fixed at the worker's start, never on what else happens nor
on what the predictor has learned since: an interrupted forward runs the very slices that an uninterrupted one runs.
Slice lengths are rounded down to 1 or 1.5 times a power of two, since two calibrations of one machine never agree
exactly, and a restarted worker should cut where it cut before.

Sizes are in rows (tokens) and in pairs (one query row against one key, over all heads of one layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from flowprefill_sglang.core.prefill_cost import CostModel, Extent

GRANULE_ROWS: Final = 64
"""Slices begin at multiples of it. Attention kernels work on blocks of 64 or 128 queries, matrix products on tiles of
at most that many rows: smaller slices would leave part of each unused, and on a CPU very few rows take another code
path, whose rounding differs."""
MIN_TAIL_ROWS: Final = 16
"""A rest shorter than this joins the slice before it, for the same reason."""


@dataclass(frozen=True, slots=True)
class OperatorCosts:
    """Seconds of single operators, from the cost model of whole forwards."""

    flop_s: float
    """Of one floating-point operation of a matrix product."""
    pair_s: float
    """Of one pair of causal attention in one layer."""
    cached_pair_s: float = 0.0
    """The same where both are cached: SGLang's torch_native attention computes those again."""
    least_rows: int = 0
    """Fewer query rows take as long as these against the same keys (``wave_rows``); 0: each row counts."""

    def attention_s(self, extents: Sequence[Extent]) -> float:
        """Predicted seconds of one layer's attention, unsliced."""
        work_s = sum(
            self.pair_s * extent.new_tokens * (0.5 * extent.new_tokens + extent.cached_tokens)
            + self.cached_pair_s * 0.5 * extent.cached_tokens**2
            for extent in extents
        )
        most_keys = max((extent.new_tokens + extent.cached_tokens for extent in extents), default=0)
        return max(work_s, self.pair_s * self.least_rows * most_keys)


def operator_costs(
    model: CostModel, *, row_flops: float, pair_flops: float, attention_layers: int, least_rows: int = 0
) -> OperatorCosts:
    """Split the cost of a whole forward over its operators by their operations.

    ``row_flops``: of all matrix products of a forward, for one row; ``pair_flops``: of one pair in one layer;
    ``least_rows``: as in ``OperatorCosts``. What lies between operators (norms, activations) is counted as theirs, so
    they are rather over- than underestimated. A fit that saw only short prompts may know nothing of attention: it is
    taken to be no faster than matrix products are.
    """
    token_s = model.long_token_s or model.short_token_s
    flop_s = token_s / row_flops if row_flops else 0.0
    layers = max(1, attention_layers)
    return OperatorCosts(
        flop_s=flop_s,
        pair_s=max(model.pair_s / layers, pair_flops * flop_s),
        cached_pair_s=model.cached_pair_s / layers,
        least_rows=least_rows,
    )


def wave_rows(processors: int, heads: int, block_rows: int) -> int:
    """Query rows that keep a device busy once, where its kernel gives each block of ``block_rows`` rows of one head,
    with all of its keys, to one of ``processors`` (multiprocessors). Fewer rows leave processors idle and take as
    long: the shortest possible call lasts ``block_rows`` rows times all keys of one head on one processor."""
    return max(1, processors // heads) * block_rows


def row_limit(row_s: float, max_blocking_s: float) -> int | None:
    """Most rows of a slice, given the seconds of one row; None when no number of rows takes too long."""
    if row_s <= 0 or not math.isfinite(max_blocking_s):
        return None
    return _stepped(max_blocking_s / row_s)


def _stepped(rows: float) -> int:
    """The largest of 64, 128, 192, 256, 384, … that is not above ``rows``, but at least a granule."""
    if rows < 2 * GRANULE_ROWS:
        return GRANULE_ROWS
    power = 1 << int(math.log2(rows))
    return power + power // 2 if rows >= power + power // 2 else power


def row_slices(rows: int, limit: int) -> list[tuple[int, int]]:
    """``rows`` in slices of about equal length, at most ``limit`` (and a rest that is too short to stand alone)."""
    if rows <= limit:
        return [(0, rows)]
    count = math.ceil(rows / limit)
    step = min(limit, math.ceil(rows / count / GRANULE_ROWS) * GRANULE_ROWS)
    begins = list(range(0, rows, step))
    if len(begins) > 1 and rows - begins[-1] < MIN_TAIL_ROWS:
        begins.pop()
    return list(zip(begins, [*begins[1:], rows], strict=True))


@dataclass(frozen=True, slots=True)
class Piece:
    """Some query rows of one request, against all keys up to each of them."""

    request: int
    """Index into the batch."""
    begin: int
    end: int
    """Rows ``begin:end`` of the request's new tokens."""
    key_parts: int = 1
    """Into how many segments the keys must be split, because even the fewest rows against all of them take too long."""


Tile = tuple[Piece, ...]
"""The rows of one slice of attention: consecutive in the batch, of one request or several."""


def attention_tiles(
    extents: Sequence[Extent], max_pairs: float, granule_rows: int = GRANULE_ROWS, least_rows: int = 0
) -> list[Tile]:
    """All query rows of a batch in tiles of at most ``max_pairs`` pairs, as long as a granule of rows fits into it.

    Tiles begin at multiples of ``granule_rows`` in their requests. A tile's pairs are its rows times the keys of its
    last row, as kernels compute whole blocks; ``least_rows`` is as in ``OperatorCosts``. Rows whose keys are split have
    a tile of their own.
    """
    tail_rows = min(MIN_TAIL_ROWS, granule_rows // 4)
    tiles: list[Tile] = []
    tile: list[Piece] = []
    left = float(max_pairs)
    for index, extent in enumerate(extents):
        begin = 0
        while begin < extent.new_tokens:
            rest = extent.new_tokens - begin
            keys = extent.cached_tokens + begin
            rows = _rows_within(left, keys)
            if rows < min(rest, granule_rows) and tile:
                tiles.append(tuple(tile))
                tile, left = [], float(max_pairs)
                continue
            rows = max(granule_rows, rows // granule_rows * granule_rows) if rows < rest else rest
            if rest - rows < tail_rows:
                rows = rest
            pairs = rows * (keys + rows)
            slowest = max(rows, least_rows) * (keys + rows)
            parts = 1 if rows > granule_rows + tail_rows else max(1, math.ceil(slowest / max_pairs))
            if parts > 1 and tile:
                tiles.append(tuple(tile))
                tile = []
            tile.append(Piece(index, begin, begin + rows, parts))
            left -= pairs
            begin += rows
            if begin < extent.new_tokens or parts > 1:
                tiles.append(tuple(tile))
                tile, left = [], float(max_pairs)
    if tile:
        tiles.append(tuple(tile))
    return tiles


def _rows_within(pairs: float, keys: int) -> int:
    """Most rows r with r·(keys + r) ≤ pairs."""
    if pairs <= 0:
        return 0
    return int((math.sqrt(keys * keys + 4 * pairs) - keys) / 2)


def key_segments(keys: int, parts: int, block: int) -> list[tuple[int, int]]:
    """``keys`` in at most ``parts`` segments whose lengths are multiples of ``block``, the last one's excepted."""
    step = max(1, math.ceil(keys / parts / block)) * block
    return [(begin, min(keys, begin + step)) for begin in range(0, keys, step)]
