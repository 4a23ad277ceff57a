"""Gathering and scattering pages, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.kernels.kv_pages import block_bytes, gather_pages, map_buffer, scatter_pages

POOL_PAGES = 13

page_sizes = st.lists(st.integers(1, 70), min_size=1, max_size=4)
page_lists = st.lists(st.integers(0, POOL_PAGES - 1), unique=True, max_size=POOL_PAGES)


def make_buffers(page_bytes: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (POOL_PAGES, size), dtype=torch.uint8, generator=generator) for size in page_bytes]


def gather_by_loop(buffers: list[torch.Tensor], pages: list[int]) -> bytes:
    return b"".join(bytes(buffer[page].tolist()) for buffer in buffers for page in pages)


@given(page_sizes, page_lists, st.integers(0, 1000))
def test_gather_equals_a_loop(page_bytes: list[int], pages: list[int], seed: int) -> None:
    buffers = make_buffers(page_bytes, seed)
    block = torch.empty(block_bytes(buffers, len(pages)), dtype=torch.uint8)
    gather_pages(buffers, np.array(pages, dtype=np.int32), block)
    assert block.numpy().tobytes() == gather_by_loop(buffers, pages)


@given(page_sizes, page_lists, st.integers(0, 1000), st.integers(0, 7))
def test_scatter_is_the_inverse_and_touches_nothing_else(
    page_bytes: list[int], pages: list[int], seed: int, misalignment: int
) -> None:
    source, destination = make_buffers(page_bytes, seed), make_buffers(page_bytes, seed + 1)
    before = [buffer.clone() for buffer in destination]
    block = bytes(misalignment) + gather_by_loop(source, pages)
    scatter_pages(destination, np.array(pages, dtype=np.int64), memoryview(block)[misalignment:])
    for page in range(POOL_PAGES):
        for index, buffer in enumerate(destination):
            expected = source[index] if page in pages else before[index]
            assert torch.equal(buffer[page], expected[page])


def test_a_mapped_buffer_is_the_memory_itself() -> None:
    memory = np.zeros(50, dtype=np.uint8)
    mapped = map_buffer(memory.ctypes.data, memory.nbytes, 8, torch.device("cpu"))
    assert mapped.shape == (6, 8)
    scatter_pages([mapped], np.array([5]), memoryview(bytes(range(1, 9))))
    assert memory[40:48].tolist() == list(range(1, 9))
    assert not memory[:40].any()
    assert not memory[48:].any()


@pytest.mark.parametrize("pages", [[-1], [POOL_PAGES], [0, POOL_PAGES]])
def test_a_page_outside_the_pool_is_refused_and_nothing_is_written(pages: list[int]) -> None:
    buffers = make_buffers([8, 8], 0)
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises(IndexError, match=r"pages 0\.\.12"):
        scatter_pages(buffers, np.array(pages), memoryview(bytes(16 * len(pages))))
    with pytest.raises(IndexError):
        gather_pages(buffers, np.array(pages), torch.empty(16 * len(pages), dtype=torch.uint8))
    assert all(torch.equal(now, then) for now, then in zip(buffers, before, strict=True))


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_block_of_the_wrong_size_is_refused(size: int) -> None:
    buffers = make_buffers([8, 8], 0)
    with pytest.raises(ValueError, match="take 16"):
        scatter_pages(buffers, np.array([3]), memoryview(bytes(size)))
    with pytest.raises(ValueError, match="take 16"):
        gather_pages(buffers, np.array([3]), torch.empty(size, dtype=torch.uint8))


def test_memory_that_holds_no_page_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no page"):
        map_buffer(0, 7, 8, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_buffers_on_a_device() -> None:
    host = make_buffers([16, 24], 0)
    device = [buffer.cuda() for buffer in host]
    mapped = [map_buffer(b.data_ptr(), b.nbytes, b.shape[1], b.device) for b in device]
    pages = [7, 0, 3]
    block = torch.empty(block_bytes(mapped, len(pages)), dtype=torch.uint8)
    gather_pages(mapped, np.array(pages), block)
    assert block.numpy().tobytes() == gather_by_loop(host, pages)
    target = [torch.zeros_like(buffer) for buffer in device]
    scatter_pages(target, np.array(pages), memoryview(block.numpy()))
    assert all(torch.equal(t[pages], d[pages]) for t, d in zip(target, device, strict=True))
