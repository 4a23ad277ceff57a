"""Both ends of a KV transfer in one process, with small pools of their own. Used by the tests of the links."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flowprefill_sglang.kernels.kv_pages import map_buffer
from flowprefill_sglang.kv.decode_links import DecodeLinks
from flowprefill_sglang.kv.layout import Layout
from flowprefill_sglang.kv.messages import PROTOCOL_VERSION, Announce, Register
from flowprefill_sglang.kv.prefill_links import PrefillLinks
from flowprefill_sglang.kv.settings import KvSettings

HOST = "127.0.0.1"
PREFILL = "prefill:1"
POOL_PAGES = 64
PAGE_BYTES = (48, 48, 16)
AUX_BYTES = (64, 8)
LAYOUT = Layout(
    page_tokens=1,
    dtype="float32",
    kv_layout=None,
    page_bytes=PAGE_BYTES,
    layer_ids=(),
    aux_bytes=AUX_BYTES,
    attn_tp_size=1,
    attn_tp_rank=0,
)
SMALL = KvSettings(chunk_bytes=200, window_chunks=2, staging_chunks=2, handshake_timeout_s=5, stall_timeout_s=5)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Return when the condition holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.001)  # between two looks at the condition


class Pool:
    """KV and metadata memory of one side."""

    def __init__(self, seed: int | None) -> None:
        sizes = [POOL_PAGES * size for size in PAGE_BYTES], [8 * size for size in AUX_BYTES]
        random = np.random.default_rng(seed)
        self.kv, self.aux = (
            [
                random.integers(1, 255, size, dtype=np.uint8) if seed is not None else np.zeros(size, dtype=np.uint8)
                for size in group
            ]
            for group in sizes
        )

    @staticmethod
    def _map(memory: list[np.ndarray], row_bytes: tuple[int, ...]) -> list[torch.Tensor]:
        return [
            map_buffer(m.ctypes.data, m.nbytes, size, torch.device("cpu"))
            for m, size in zip(memory, row_bytes, strict=True)
        ]

    @property
    def buffers(self) -> list[torch.Tensor]:
        return self._map(self.kv, PAGE_BYTES)

    @property
    def aux_buffers(self) -> list[torch.Tensor]:
        return self._map(self.aux, AUX_BYTES)

    def pages(self, ids: list[int]) -> bytes:
        return b"".join(bytes(b[i].numpy()) for b in self.buffers for i in ids)

    def metadata(self, index: int) -> bytes:
        return b"".join(bytes(b[index].numpy()) for b in self.aux_buffers)

    def copy(self) -> bytes:
        return b"".join(m.tobytes() for m in (*self.kv, *self.aux))


class Decode:
    """A decode rank's end."""

    def __init__(self, settings: KvSettings = SMALL, layout: Layout = LAYOUT) -> None:
        self.pool = Pool(None)
        self.complete: list[int] = []
        self.failed: dict[int, str] = {}
        self.links = DecodeLinks(
            host=HOST,
            layout=layout,
            buffers=self.pool.buffers,
            aux_buffers=self.pool.aux_buffers,
            settings=settings,
            on_complete=self.complete.append,
            on_failed=self.failed.__setitem__,
        )

    def registration(self, **changes: object) -> Register:
        fields = {
            "protocol": PROTOCOL_VERSION,
            "session": self.links.session,
            "host": HOST,
            "control_port": 1,
            "link_port": self.links.port,
            "max_chunk_bytes": self.links.max_chunk_bytes,
            "layout": LAYOUT,
        }
        return Register(**(fields | changes))

    def open(self, room: int, ids: list[int], aux_index: int = 0, prefill: str = PREFILL) -> Announce:
        transfer = self.links.open(room, page_ids=np.array(ids, np.int32), aux_index=aux_index, prefill=prefill)
        return Announce(
            session=self.links.session,
            host=HOST,
            control_port=1,
            room=room,
            transfer=transfer,
            pages=len(ids),
            decode_prefix_tokens=0,
        )


class Prefill:
    """A prefill rank's end."""

    def __init__(self, settings: KvSettings = SMALL, layout: Layout = LAYOUT) -> None:
        self.pool = Pool(seed=3)
        self.delivered: list[int] = []
        self.failed: dict[int, str] = {}
        self.links = PrefillLinks(
            name=PREFILL,
            layout=layout,
            buffers=self.pool.buffers,
            aux_buffers=self.pool.aux_buffers,
            settings=settings,
            on_delivered=self.delivered.append,
            on_failed=lambda room, reason, announce: self.failed.__setitem__(room, reason),
        )

    def send(self, room: int, ids: list[int], first_page: int = 0, aux_index: int | None = 0) -> None:
        self.links.send(room, np.array(ids, np.int32), first_page=first_page, aux_index=aux_index)


def stream_until_killed(announces: Any, registrations: Any) -> None:  # multiprocessing queues
    """A process that is a prefill rank: begins every room and ends none."""
    side = Prefill()
    side.links.register(registrations.get())
    while True:
        announce = announces.get()
        side.links.announce(announce)
        side.send(announce.room, [0, 1], aux_index=None)  # and never the rest


def receive_until_killed(registrations: Any, announces: Any) -> None:  # multiprocessing queues
    """A process that is a decode rank with three rooms."""
    side = Decode()
    registrations.put(side.registration())
    for room in range(3):
        announces.put(side.open(room, list(range(room * 10, room * 10 + 10))))
    wait_until(lambda: False, "being killed", timeout_s=60)


def transfer(prefill: Prefill, decode: Decode, room: int, source: list[int], target: list[int], aux: int = 0) -> None:
    prefill.links.announce(decode.open(room, target, aux_index=aux))
    prefill.send(room, source, aux_index=aux)
