"""KV pages to one contiguous block and back: the reference implementation, in PyTorch and NumPy.

A *buffer* is one K or V buffer of the pool (or any other per-page buffer that SGLang hands over), seen as a
``uint8[pages, page_bytes]`` tensor; ``page_bytes`` may differ between buffers. A *block* is host memory that holds
``len(pages)`` rows of the first buffer, then of the second, and so on, without gaps.

On a CPU, rows are moved as opaque items (NumPy's ``void`` type): one ``memcpy`` a row whatever its size and alignment,
measured as fast as the fastest of ``index_select`` and integer views for rows of 2 KiB, and up to 12 times faster than
``index_copy_``. NumPy and PyTorch both release the interpreter lock meanwhile. On an accelerator the rows are moved by
Triton (``kv_rows_triton``) or by the reference, ``index_select`` and ``index_copy_``, as ``selection`` says, and cross
the bus as one block a buffer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowprefill_sglang.kernels.selection import Kernel, Name, choose

PageIds = npt.NDArray[np.integer[Any]]


def map_buffer(address: int, length_bytes: int, page_bytes: int, device: torch.device) -> torch.Tensor:
    """The memory at ``address`` as ``uint8[length_bytes // page_bytes, page_bytes]`` on ``device``, without a copy.

    The caller keeps the memory alive for as long as the tensor is used. A rest shorter than a page is left out.
    Raises ValueError for sizes that hold no page.
    """
    if page_bytes <= 0 or length_bytes < page_bytes:
        raise ValueError(f"{length_bytes} bytes hold no page of {page_bytes} bytes")
    pages = length_bytes // page_bytes
    if device.type == "cpu":
        memory = (ctypes.c_uint8 * (pages * page_bytes)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(pages, page_bytes)
    return torch.as_tensor(_DeviceMemory(address, (pages, page_bytes)), device=device)


def block_bytes(buffers: Sequence[torch.Tensor], pages: int) -> int:
    """Size of the block that holds ``pages`` rows of each buffer."""
    return pages * sum(buffer.shape[1] for buffer in buffers)


def gather_pages(buffers: Sequence[torch.Tensor], pages: PageIds, block: torch.Tensor) -> None:
    """Copy the rows ``pages`` of each buffer into ``block``.

    ``pages``: int[n]; ``block``: contiguous ``uint8`` host tensor of exactly ``block_bytes(buffers, n)`` bytes. Returns
    when the copy is complete. Raises IndexError for a page that a buffer does not have, ValueError for a wrong size.
    """
    _check(buffers, pages, block.numel())
    rows = np.ascontiguousarray(pages, dtype=np.int64)
    end = 0
    for buffer in buffers:
        begin, end = end, end + len(rows) * buffer.shape[1]
        part = block[begin:end]
        if buffer.is_cpu:
            # Bounds are checked above; in its "raise" mode take() would go through a temporary.
            np.take(_items(buffer), rows, out=_items(part.view(len(rows), buffer.shape[1])), mode="clip")
        else:
            picked = gather_rows(buffer, torch.from_numpy(rows).to(buffer.device))
            part.view(picked.shape).copy_(picked)


def scatter_pages(buffers: Sequence[torch.Tensor], pages: PageIds, block: memoryview) -> None:
    """Copy ``block`` back into the rows ``pages`` of each buffer: the inverse of ``gather_pages``.

    ``block`` may be read-only, of any alignment, and is read in place. Returns when the writes are complete, on an
    accelerator too. Raises as ``gather_pages`` does, before anything is written.
    """
    _check(buffers, pages, block.nbytes)
    rows = np.ascontiguousarray(pages, dtype=np.int64)
    source = np.frombuffer(block, dtype=np.uint8)
    end = 0
    for buffer in buffers:
        begin, end = end, end + len(rows) * buffer.shape[1]
        part = source[begin:end]
        if buffer.is_cpu:
            _items(buffer)[rows] = part.view(_item_type(buffer))
        else:
            # The copy is for PyTorch, which takes no read-only memory.
            host = torch.from_numpy(part.reshape(len(rows), buffer.shape[1]).copy())
            scatter_rows(buffer, torch.from_numpy(rows).to(buffer.device), host.to(buffer.device))
    for device in {buffer.device for buffer in buffers if buffer.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def gather_rows(pool: torch.Tensor, rows: torch.Tensor, name: Name | None = None) -> torch.Tensor:
    """``pool[rows]``, on the pool's device, by the implementation chosen for it or by the one that is named.

    ``pool``: contiguous ``uint8[pages, page_bytes]``; ``rows``: int64[n] within it.
    """
    if (name or _choice(pool)) is Name.TRITON:
        from flowprefill_sglang.kernels import kv_rows_triton

        return kv_rows_triton.gather_rows(pool, rows)
    return pool.index_select(0, rows)


def scatter_rows(pool: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, name: Name | None = None) -> None:
    """``pool[rows] = block``, likewise; ``rows`` are all different."""
    if (name or _choice(pool)) is Name.TRITON:
        from flowprefill_sglang.kernels import kv_rows_triton

        kv_rows_triton.scatter_rows(pool, rows, block)
    else:
        pool.index_copy_(0, rows, block)


def _choice(pool: torch.Tensor) -> Name:
    return choose(Kernel.ROWS, pool.device.type, pool.dtype, pool.shape[1]).name


def _check(buffers: Sequence[torch.Tensor], pages: PageIds, size_bytes: int) -> None:
    expected = block_bytes(buffers, len(pages))
    if size_bytes != expected:
        raise ValueError(f"a block of {size_bytes} bytes for {len(pages)} pages that take {expected}")
    if len(pages) and buffers:
        held = min(buffer.shape[0] for buffer in buffers)
        lowest, highest = int(pages.min()), int(pages.max())
        if lowest < 0 or highest >= held:
            raise IndexError(f"pages {lowest}..{highest} of buffers that have pages 0..{held - 1}")


def _item_type(buffer: torch.Tensor) -> np.dtype[np.void]:
    return np.dtype((np.void, buffer.shape[1]))


def _items(buffer: torch.Tensor) -> npt.NDArray[np.void]:
    items: npt.NDArray[np.void] = buffer.numpy().view(_item_type(buffer))[:, 0]
    return items


class _DeviceMemory:
    """Device memory by its address, as the CUDA array interface (version 3) describes it."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }
