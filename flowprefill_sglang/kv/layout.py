"""How KV pages lie in memory, and how a run of them is cut into messages. Pure.

A *page* is what SGLang moves as one: ``page_tokens`` tokens, ``page_bytes[b]`` bytes in buffer ``b`` (one K and one V
buffer a layer). A *span* is a rectangle of pages by buffers that travels as one message. Pages are counted from the
first page of the room (the request's transfer), so neither memory addresses nor page numbers of one side ever reach
the other: a receiver cannot be made to write outside of the pages that it reserved itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides must have in common, per rank."""

    page_tokens: int
    dtype: str
    kv_layout: str | None
    page_bytes: tuple[int, ...]
    """Bytes that a page takes in each buffer, in the pool's order."""
    layer_ids: tuple[int, ...]
    """The layer of each buffer where SGLang knows it, else empty."""
    aux_bytes: tuple[int, ...]
    """Bytes of each metadata buffer (first token, logprobs, …) for one request."""
    attn_tp_size: int
    attn_tp_rank: int


_ADVICE = {
    "page_tokens": "use the same --page-size",
    "dtype": "use the same --kv-cache-dtype",
    "kv_layout": "use the same KV cache layout",
    "page_bytes": "serve the same model with the same tensor parallelism and speculative settings",
    "layer_ids": "serve the same model without pipeline parallelism",
    "aux_bytes": "use the same SGLang version and the same logprob, sampling-mask and checksum options",
    "attn_tp_size": "use the same attention tensor parallelism, or the mooncake or nixl backend",
    "attn_tp_rank": "rank i of one side must be connected to rank i of the other",
}


def layout_mismatch(*, prefill: Layout, decode: Layout) -> str | None:
    """None when pages of one side fit the other, else one sentence that says what differs and what to do."""
    # The widths first: when they differ, so do the sizes, and they are the cause.
    for name in ("attn_tp_size", "attn_tp_rank", *Layout.__struct_fields__):
        ours, theirs = getattr(prefill, name), getattr(decode, name)
        if ours != theirs:
            return (
                f"the KV layouts differ in {name}: prefill {_short(ours)}, decode {_short(theirs)}; "
                f"on both sides, {_ADVICE[name]}"
            )
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class Span(msgspec.Struct, frozen=True):
    """Pages ``first_page .. first_page + pages`` of buffers ``first_buffer .. first_buffer + buffers``."""

    first_page: int
    pages: int
    first_buffer: int
    buffers: int

    def size_bytes(self, page_bytes: Sequence[int]) -> int:
        """Bytes of the span's block."""
        return self.pages * sum(page_bytes[self.first_buffer : self.first_buffer + self.buffers])


def largest_chunk_bytes(page_bytes: Sequence[int], chunk_bytes: int) -> int:
    """The bound that a span can keep: ``chunk_bytes``, or one buffer's page where that is larger."""
    return max(chunk_bytes, *page_bytes)


def plan_spans(page_bytes: Sequence[int], *, first_page: int, pages: int, chunk_bytes: int) -> Iterator[Span]:
    """Cut ``pages`` pages from ``first_page`` on into spans of at most ``largest_chunk_bytes``, each part once.

    As many pages as fit go into a span before a second buffer does: copying pages costs a call a buffer, so tall spans
    take fewer calls. Spans come in the one order that ``Coverage`` accepts.
    """
    tallest = max(1, chunk_bytes // max(page_bytes))
    while pages > 0:
        height = min(pages, tallest)
        first = 0
        while first < len(page_bytes):
            width, size = 0, 0
            while first + width < len(page_bytes):
                size += height * page_bytes[first + width]
                if width and size > chunk_bytes:
                    break
                width += 1
            yield Span(first_page, height, first, width)
            first += width
        first_page += height
        pages -= height


class Coverage:
    """Which part of a room has arrived. Spans must come in the order of ``plan_spans``, with no gap and no overlap."""

    def __init__(self, *, pages: int, buffers: int) -> None:
        self._pages = pages
        self._buffers = buffers
        self._page = 0  # first page of the current row of spans
        self._height = 0  # pages of the current row; 0 between rows
        self._buffer = 0  # next buffer of the current row

    @property
    def is_complete(self) -> bool:
        """Whether every page of every buffer has arrived."""
        return self._page == self._pages and self._height == 0

    def try_add(self, span: Span) -> str | None:
        """Take the span in, or say in a few words why it cannot be the next one and change nothing."""
        if span.pages < 1 or span.buffers < 1 or span.first_buffer + span.buffers > self._buffers:
            return f"{span} is no part of {self._buffers} buffers"
        if span.first_page != self._page or span.first_buffer != self._buffer:
            return f"{span} came where page {self._page} of buffer {self._buffer} was due"
        if self._height and span.pages != self._height:
            return f"{span} came in a row of {self._height} pages"
        if span.first_page + span.pages > self._pages:
            return f"{span} reaches beyond the room's {self._pages} pages"
        self._height = span.pages
        self._buffer += span.buffers
        if self._buffer == self._buffers:
            self._page += self._height
            self._buffer = self._height = 0
        return None
