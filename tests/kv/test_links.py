"""Prefill's and decode's links against each other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flowprefill_sglang.kernels.kv_pages import gather_pages, scatter_pages
from flowprefill_sglang.kv.messages import (
    PROTOCOL_VERSION,
)
from flowprefill_testing.kv_link_pair import (
    LAYOUT,
    POOL_PAGES,
    SMALL,
    Decode,
    Prefill,
    transfer,
    wait_until,
)

# ---- the good case ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 7, 40])
def test_pages_and_metadata_arrive_before_complete(prefill: Prefill, decode: Decode, pages: int) -> None:
    prefill.links.register(decode.registration())
    source, target = list(range(pages)), random.Random(pages).sample(range(POOL_PAGES), pages)
    transfer(prefill, decode, 5, source, target, aux=3)
    wait_until(lambda: 5 in decode.complete, "the room")
    assert decode.pool.pages(target) == prefill.pool.pages(source)
    assert decode.pool.metadata(3) == prefill.pool.metadata(3)
    wait_until(lambda: 5 in prefill.delivered, "the acknowledgement")
    untouched = [page for page in range(POOL_PAGES) if page not in target]
    assert not any(decode.pool.pages(untouched))


def test_chunks_of_a_prompt_are_sent_as_they_come(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    target = list(range(20, 40))
    prefill.links.announce(decode.open(1, target))
    for first in range(0, 20, 5):
        prefill.send(1, list(range(first, first + 5)), first_page=first, aux_index=0 if first == 15 else None)
        arrived = target[first : first + 5]
        wait_until(lambda a=arrived, f=first: decode.pool.pages(a) == prefill.pool.pages(range(f, f + 5)), "a chunk")
    wait_until(lambda: decode.complete == [1], "the room")


def test_many_rooms_at_once_do_not_mix(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    for start in range(0, POOL_PAGES, 4):
        transfer(prefill, decode, start, list(range(start, start + 4)), list(range(start, start + 4)))
    wait_until(lambda: len(decode.complete) == POOL_PAGES // 4, "all rooms")
    every_page = list(range(POOL_PAGES))
    assert decode.pool.pages(every_page) == prefill.pool.pages(every_page)


def test_a_short_room_does_not_wait_for_a_long_one(prefill: Prefill, decode: Decode) -> None:
    prefill.links.announce(decode.open(1, list(range(60))))
    prefill.links.announce(decode.open(2, [61]))
    prefill.send(1, list(range(60)))
    prefill.send(2, [1])
    prefill.links.register(decode.registration())  # too late for those two: unknown decode
    wait_until(lambda: set(prefill.failed) == {1, 2}, "the refusal")
    prefill.links.announce(decode.open(1, list(range(60))))
    prefill.links.announce(decode.open(2, [61]))
    prefill.send(1, list(range(60)))
    prefill.send(2, [1])
    wait_until(lambda: len(decode.complete) == 2, "both rooms")
    assert decode.complete == [2, 1]


def test_memory_of_the_sender_is_used_again(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    for room in range(200):
        transfer(prefill, decode, room, [room % POOL_PAGES] * 1, [0])
        wait_until(lambda r=room: r in prefill.delivered, "a room")
    assert len(prefill.links._staging._buffers) <= SMALL.staging_chunks


# ---- the two sides do not fit ----------------------------------------------------------------------------------------


def test_a_layout_that_differs_fails_the_room_with_the_reason(prefill: Prefill, decode: Decode) -> None:
    other = msgspec.structs.replace(LAYOUT, page_tokens=16)
    prefill.links.register(decode.registration(layout=other))
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: 1 in prefill.failed, "the refusal")
    assert "--page-size" in prefill.failed[1]


def test_decode_checks_the_layout_too(decode: Decode) -> None:
    side = Prefill(layout=msgspec.structs.replace(LAYOUT, dtype="float16"))
    side.links.register(decode.registration(layout=msgspec.structs.replace(LAYOUT, dtype="float16")))
    transfer(side, decode, 1, [0], [0])
    wait_until(lambda: 1 in side.failed, "the refusal")
    assert "refused" in side.failed[1]
    assert "--kv-cache-dtype" in side.failed[1]
    side.links.close()


def test_a_decode_without_a_common_protocol_version_is_refused(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration(protocol=PROTOCOL_VERSION + 1, version="9.9"))
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: 1 in prefill.failed, "the refusal")
    assert f"decode (FlowPrefill 9.9) speaks version {PROTOCOL_VERSION + 1}; upgrade prefill" in prefill.failed[1]


def test_a_newer_decode_that_still_speaks_the_older_version_is_served(prefill: Prefill, decode: Decode) -> None:
    newer = decode.registration(protocol=PROTOCOL_VERSION + 3, oldest_protocol=PROTOCOL_VERSION)
    prefill.links.register(newer)
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: 1 in prefill.delivered, "the transfer")


def test_a_page_that_decode_does_not_have_is_never_announced(decode: Decode) -> None:
    with pytest.raises(IndexError, match=r"there are 0\.\.63"):
        decode.open(1, [POOL_PAGES])
    with pytest.raises(IndexError, match="metadata"):
        decode.open(1, [0], aux_index=8)


def test_sides_that_count_pages_differently_both_fail(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    prefill.links.announce(decode.open(1, [0, 1]))
    prefill.send(1, [0, 1, 2])
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert "decode has reserved 2" in prefill.failed[1]
    assert not any(decode.pool.copy())


# ---- aborts ----------------------------------------------------------------------------------------------------------


def test_no_write_after_decode_gave_the_pages_back(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    prefill.links.announce(decode.open(1, list(range(8))))
    prefill.send(1, [0, 1, 2, 3], aux_index=None)
    wait_until(lambda: decode.pool.pages([0, 1, 2, 3]) == prefill.pool.pages([0, 1, 2, 3]), "the first half")
    decode.links.close(1, "aborted by the client")
    before = decode.pool.copy()
    prefill.send(1, [4, 5, 6, 7], first_page=4)
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert "aborted by the client" in prefill.failed[1]
    # The link has survived: what was sent before the failure has been read once the next room is through.
    transfer(prefill, decode, 2, [9], [63])
    wait_until(lambda: 2 in prefill.delivered, "the next room")
    after = decode.pool
    assert after.pages([4, 5, 6, 7]) == bytes(len(after.pages([4, 5, 6, 7])))
    assert before != after.copy()  # page 63 and its metadata
    assert 1 not in decode.complete
    assert 1 not in decode.failed


def test_closing_races_with_writing_and_wins(prefill: Prefill, decode: Decode) -> None:
    """Whatever moment a room is closed at, its pages do not change afterwards."""
    prefill.links.register(decode.registration())
    target = list(range(32))
    for room in range(60):
        transfer(prefill, decode, room, list(range(32, 64)), target)
        wait_until(lambda page=room % 32: any(decode.pool.buffers[0][page]), "some pages")
        decode.links.close(room, "aborted")
        for buffer in decode.pool.buffers:
            buffer.zero_()  # the pages are another request's now
        wait_until(lambda r=room: r in prefill.failed or r in prefill.delivered, "the room's end")
        assert not any(decode.pool.pages(target))


class Gate:
    """Stands before a function of the link's thread: tells when it is reached, and lets it pass when told to."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.may_pass = threading.Event()

    def wait(self) -> None:
        self.is_reached.set()
        assert self.may_pass.wait(20)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any) -> Any:
            self.wait()
            return function(*args)

        return gated


def test_closing_waits_for_a_write_under_way(prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr("flowprefill_sglang.kv.decode_links.scatter_pages", gate.before(scatter_pages))
    prefill.links.register(decode.registration())
    transfer(prefill, decode, 1, [0], [7])
    assert gate.is_reached.wait(20)
    closer = threading.Thread(target=decode.links.close, args=(1, "aborted"))
    closer.start()
    wait_until(lambda: 1 not in decode.links._rooms, "the closing thread")
    closer.join(0.1)
    assert closer.is_alive(), "close() returned while a payload was being written"
    gate.may_pass.set()
    closer.join(20)
    assert not closer.is_alive()
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert not decode.complete


def test_a_payload_that_waited_for_the_lock_is_not_written_after_closing(prefill: Prefill, decode: Decode) -> None:
    gate = Gate()

    class GatedLock:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            if threading.current_thread().name == "kv-decode-links":
                gate.wait()
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    prefill.links.register(decode.registration())
    announce = decode.open(1, [7])
    decode.links._rooms[1].lock = GatedLock()
    prefill.links.announce(announce)
    prefill.send(1, [0])
    assert gate.is_reached.wait(20)
    decode.links.close(1, "aborted")
    gate.may_pass.set()
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert not any(decode.pool.copy())


def test_pages_read_after_a_cancellation_are_not_sent(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr("flowprefill_sglang.kv.prefill_links.gather_pages", gate.before(gather_pages))
    prefill.links.register(decode.registration())
    transfer(prefill, decode, 1, [1], [1])
    assert gate.is_reached.wait(20)
    prefill.links.cancel(1, "aborted on the prefill side")
    for buffer in prefill.pool.buffers:
        buffer[1] = 77  # the page is another request's now
    gate.may_pass.set()
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert prefill.failed[1] == "aborted on the prefill side"
    transfer(prefill, decode, 2, [5], [5])
    wait_until(lambda: decode.complete == [2], "the next room")
    assert not any(decode.pool.pages([1]))


def test_a_room_number_may_be_used_again(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    for attempt in range(3):
        prefill.links.announce(decode.open(1, [attempt]))
        prefill.links.announce(decode.open(1, [attempt + 10]))  # the router tried again
        prefill.send(1, [attempt])
        wait_until(lambda a=attempt: len(decode.complete) == a + 1, "the room")
        assert decode.pool.pages([attempt + 10]) == prefill.pool.pages([attempt])
        assert not any(decode.pool.pages([attempt]))


def test_a_room_closed_while_its_end_is_written_is_not_complete(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr("flowprefill_sglang.kv.decode_links.scatter_pages", gate.before(scatter_pages))
    prefill.links.register(decode.registration())
    transfer(prefill, decode, 1, [], [])  # metadata only
    assert gate.is_reached.wait(20)
    closer = threading.Thread(target=decode.links.close, args=(1, "aborted"))
    closer.start()
    wait_until(lambda: 1 not in decode.links._rooms, "the closing thread")
    gate.may_pass.set()
    closer.join(20)
    wait_until(lambda: 1 in prefill.delivered or 1 in prefill.failed, "the room's end")
    assert not decode.complete


# ---- our own bugs ----------------------------------------------------------------------------------------------------


def test_an_error_in_the_sending_thread_fails_the_room_and_the_next_one_works(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.links.register(decode.registration())
    with monkeypatch.context() as patch:
        patch.setattr("flowprefill_sglang.kv.prefill_links.gather_pages", lambda *_: 1 / 0)
        transfer(prefill, decode, 1, [0], [0])
        wait_until(lambda: 1 in prefill.failed, "the failure")
    assert "ZeroDivisionError" in prefill.failed[1]
    transfer(prefill, decode, 2, [0], [0])
    wait_until(lambda: 2 in decode.complete, "the next room")


def test_an_error_in_the_receiving_thread_fails_the_room_and_the_next_one_works(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.links.register(decode.registration())
    with monkeypatch.context() as patch:
        patch.setattr("flowprefill_sglang.kv.decode_links.scatter_pages", lambda *_: 1 / 0)
        transfer(prefill, decode, 1, [0], [0])
        wait_until(lambda: 1 in prefill.failed and 1 in decode.failed, "the failure")
    assert "ZeroDivisionError" in prefill.failed[1]
    transfer(prefill, decode, 2, [0], [0])
    wait_until(lambda: 2 in decode.complete, "the next room")
