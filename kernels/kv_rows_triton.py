"""Rows of a matrix by their numbers, and back, in Triton: what ``index_select`` and ``index_copy_`` do, as plain copies
of 8 bytes a lane whatever the rows hold."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

WORDS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
BLOCK_WORDS: Final = 512


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, rows, target, words, IS_GATHER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row ``rows[i]`` of the pool from or to row ``i`` of the block; a program copies ``BLOCK`` words of it."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < words
    if IS_GATHER:
        tl.store(target + place * words + columns, tl.load(source + row * words + columns, mask=inside), mask=inside)
    else:
        tl.store(target + row * words + columns, tl.load(source + place * words + columns, mask=inside), mask=inside)


def gather_rows(pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``pool[rows]`` of a contiguous ``uint8[pages, page_bytes]``; ``rows``: int64[n] on its device."""
    block = pool.new_empty((rows.shape[0], pool.shape[1]))
    _run(pool, rows, block, is_gather=True)
    return block


def scatter_rows(pool: torch.Tensor, rows: torch.Tensor, block: torch.Tensor) -> None:
    """``pool[rows] = block``, of contiguous tensors; ``rows`` are all different."""
    _run(block, rows, pool, is_gather=False)


def _run(source: torch.Tensor, rows: torch.Tensor, target: torch.Tensor, *, is_gather: bool) -> None:
    width = source.shape[1]
    for size, dtype in WORDS:  # the widest word that rows and both addresses are multiples of
        if width % size == source.data_ptr() % size == target.data_ptr() % size == 0:
            source, target, width = source.view(dtype), target.view(dtype), width // size
            break
    if rows.numel():
        grid = (rows.shape[0], triton.cdiv(width, BLOCK_WORDS))
        _copy[grid](source, rows, target, width, IS_GATHER=is_gather, BLOCK=BLOCK_WORDS)
