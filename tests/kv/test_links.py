"""Prefill's and decode's links against each other, and against peers that die, lie or break the rules."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from flowprefill_sglang.kernels.kv_pages import gather_pages, scatter_pages
from flowprefill_sglang.kv.layout import Span
from flowprefill_sglang.kv.messages import (
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    Accepted,
    Announce,
    Chunk,
    Credit,
    End,
    FromDecode,
    FromPrefill,
    Hello,
    Refused,
    Rejected,
    Welcome,
    checksum,
    decode_from_decode,
    encode,
)
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_testing.kv_link_pair import (
    HOST,
    LAYOUT,
    PAGE_BYTES,
    POOL_PAGES,
    PREFILL,
    SMALL,
    Decode,
    Prefill,
    receive_until_killed,
    stream_until_killed,
    wait_until,
)


@pytest.fixture
def decode() -> Iterator[Decode]:
    side = Decode()
    yield side
    side.links.shut_down()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    side = Prefill()
    yield side
    side.links.close()


def transfer(prefill: Prefill, decode: Decode, room: int, source: list[int], target: list[int], aux: int = 0) -> None:
    prefill.links.announce(decode.open(room, target, aux_index=aux))
    prefill.send(room, source, aux_index=aux)


# ---- the good case -----------------------------------------------------------------------------------------------


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


# ---- the two sides do not fit -------------------------------------------------------------------------------------


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


def test_another_protocol_version_is_refused(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration(protocol=PROTOCOL_VERSION + 1))
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: 1 in prefill.failed, "the refusal")
    assert "same FlowPrefill version" in prefill.failed[1]


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


# ---- aborts ------------------------------------------------------------------------------------------------------


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
    decode.links._rooms[1].lock = GatedLock()  # type: ignore[assignment]
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


# ---- death -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_started", [True, False])
def test_a_killed_prefill_fails_its_rooms_at_once(decode: Decode, is_started: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    announces, registrations = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=stream_until_killed, args=(announces, registrations), daemon=True)
    child.start()
    registrations.put(decode.registration())
    announces.put(decode.open(1, [0, 1, 2, 3]))
    wait_until(lambda: any(decode.pool.pages([1])), "the first pages", timeout_s=60)
    if not is_started:
        decode.open(2, [8])  # reserved, and nothing of it has arrived
    child.kill()
    child.join()
    rooms = {1} if is_started else {1, 2}
    wait_until(lambda: set(decode.failed) == rooms, "the failure", timeout_s=3)
    assert f"lost the KV connection to prefill {PREFILL}" in decode.failed[1]
    for queue in (announces, registrations):
        queue.close()


def test_a_killed_decode_fails_its_rooms_at_once(prefill: Prefill) -> None:
    spawn = multiprocessing.get_context("spawn")
    registrations, announces = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=receive_until_killed, args=(registrations, announces), daemon=True)
    child.start()
    prefill.links.register(registrations.get(timeout=60))
    for _ in range(3):
        announce = announces.get(timeout=60)
        prefill.links.announce(announce)
        prefill.send(announce.room, list(range(5)), aux_index=None)
    wait_until(lambda: all(link.is_welcome for link in prefill.links._links.values()), "the handshake")
    child.kill()
    child.join()
    wait_until(lambda: len(prefill.failed) == 3, "the failure", timeout_s=3)
    assert all("lost the connection to decode" in reason for reason in prefill.failed.values())
    for queue in (announces, registrations):
        queue.close()


def test_a_decode_that_is_not_there_fails_the_room(prefill: Prefill, decode: Decode) -> None:
    registration = decode.registration()
    announce = decode.open(1, [0])
    decode.links.shut_down()
    prefill.links.register(registration)
    prefill.links.announce(announce)
    prefill.send(1, [0])
    wait_until(lambda: 1 in prefill.failed, "the failure", timeout_s=3)
    assert "lost the connection" in prefill.failed[1]
    decode.links = Decode().links  # for the fixture to close


def test_a_decode_without_an_address_leaves_the_others_alone(prefill: Prefill, decode: Decode) -> None:
    prefill.links.register(decode.registration())
    prefill.links.announce(decode.open(1, [0, 1]))
    prefill.send(1, [0], aux_index=None)
    wait_until(lambda: any(decode.pool.pages([0])), "the first page")
    prefill.links.register(decode.registration(session="elsewhere", host="no such host"))
    prefill.links.announce(msgspec.structs.replace(decode.open(2, [3]), session="elsewhere"))
    wait_until(lambda: 2 in prefill.failed, "the failure")
    assert "no connection to decode no such host" in prefill.failed[2]
    prefill.send(1, [1], first_page=1)
    wait_until(lambda: decode.complete == [1], "the first room")
    assert set(prefill.failed) == {2}


def test_one_decode_too_many_does_not_disturb_the_others(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowprefill_sglang.kv.prefill_links._MAX_KNOWN_PEERS", 1)
    prefill.links.register(decode.registration())
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: decode.complete == [1], "a room of the first")
    other = Decode()
    prefill.links.register(other.registration())  # the first has a link and stays, so this one is one too many
    transfer(prefill, other, 2, [0], [0])
    wait_until(lambda: 2 in prefill.failed, "the refusal")
    assert "has not introduced itself" in prefill.failed[2]
    assert not other.links.is_linked(PREFILL)
    transfer(prefill, decode, 3, [0], [0])
    wait_until(lambda: decode.complete == [1, 3], "the next room of the first")
    assert set(prefill.failed) == {2}
    other.links.shut_down()


def test_a_side_that_shuts_down_fails_its_rooms() -> None:
    prefill, decode = Prefill(), Decode()
    prefill.links.register(decode.registration())
    prefill.links.announce(decode.open(1, [0]))
    decode.links.shut_down()
    assert decode.failed == {1: "the decode side is shutting down"}
    decode.links.close(1, "the scheduler forgets the request later")
    wait_until(lambda: 1 in prefill.failed, "the failure")
    prefill.links.close()
    prefill.links.cancel(1, "the scheduler forgets the request later")


def test_peers_that_come_and_go_leave_nothing_behind(prefill: Prefill, decode: Decode) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    for attempt in range(2):  # the first makes what is made once
        files, threads = open_files(), threading.active_count()
        for number in range(100):
            prefill.links.register(decode.registration(session=f"gone {attempt} {number}"))  # decode refuses it
            rogue = RoguePrefill(decode, name=f"prefill {number}")
            rogue.connect()
            rogue.close()
    wait_until(lambda: not prefill.links._links and not decode.links._links, "the links to be forgotten")
    wait_until(lambda: open_files() <= files + 3, "the sockets to be closed")
    assert threading.active_count() <= threads
    prefill.links.register(decode.registration())
    transfer(prefill, decode, 1, [0], [0])
    wait_until(lambda: decode.complete == [1], "a room")


def test_a_process_ends_with_transfers_under_way() -> None:
    script = """
        from flowprefill_testing.kv_link_pair import Decode, Prefill, wait_until
        prefill, decode = Prefill(), Decode()
        prefill.links.register(decode.registration())
        prefill.links.announce(decode.open(1, [0, 1]))
        prefill.send(1, [0], aux_index=None)
        wait_until(lambda: any(decode.pool.pages([0])), "the first page")
        print("under way")
    """
    support = pathlib.Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(support)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "under way\n", "")


# ---- a prefill side that breaks the rules -------------------------------------------------------------------------


class RoguePrefill:
    """Speaks the link protocol by hand."""

    def __init__(self, decode: Decode, name: str = PREFILL) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self._socket.connect(f"tcp://{HOST}:{decode.links.port}")
        self.hello = Hello(protocol=PROTOCOL_VERSION, prefill=name, session=decode.links.session, layout=LAYOUT)

    def send(self, message: FromPrefill | bytes, *payload: bytes) -> None:
        self._socket.send_multipart([message if isinstance(message, bytes) else encode(message), *payload])

    def receive(self) -> FromDecode:
        return decode_from_decode(self._socket.recv_multipart())

    def connect(self) -> None:
        self.send(self.hello)
        assert self.receive() == Welcome(credit_chunks=SMALL.window_chunks)

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def rogue(decode: Decode) -> Iterator[RoguePrefill]:
    side = RoguePrefill(decode)
    yield side
    side.close()


ROW = sum(PAGE_BYTES)


def a_chunk(announce: Announce, payload: bytes, **changes: object) -> Chunk:
    fields = {"room": announce.room, "transfer": announce.transfer, "sequence": 0, "span": Span(0, 1, 0, 3)} | changes
    digest = checksum(memoryview(payload), transfer=fields["transfer"], sequence=fields["sequence"])  # type: ignore
    return Chunk(**({"checksum": digest} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({"checksum": 1}, ROW, "damaged"),
        ({}, ROW - 1, "bytes where"),
        ({}, ROW + 1, "bytes where"),
        ({"sequence": 1}, ROW, "lost, repeated or swapped"),
        ({"span": Span(1, 1, 0, 3)}, ROW, "was due"),
        ({"span": Span(0, 9, 0, 3)}, 9 * ROW, "beyond"),
        ({"span": Span(0, 1, 0, 4)}, ROW, "no part"),
        ({"span": Span(-1, 1, 0, 3)}, ROW, "was due"),
        ({"span": Span(0, -1, 0, 3)}, ROW, "no part"),
    ],
)
def test_a_bad_chunk_fails_the_room_on_both_sides_and_writes_nothing(
    decode: Decode, rogue: RoguePrefill, changes: dict[str, object], size: int, expected: str
) -> None:
    rogue.connect()
    announce = decode.open(1, [4, 5])
    payload = b"x" * size
    rogue.send(a_chunk(announce, payload, **changes), payload)
    answer = rogue.receive()
    assert isinstance(answer, Rejected)
    assert expected in answer.reason
    wait_until(lambda: 1 in decode.failed, "the failure")
    assert expected in decode.failed[1]
    assert not any(decode.pool.copy())
    assert rogue.receive() == Credit(chunks=SMALL.window_chunks + 1)  # the link goes on


def test_a_repeated_chunk_fails_the_room(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4, 5])
    payload = b"x" * ROW
    for _ in range(2):
        rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Credit)
    answer = rogue.receive()
    assert isinstance(answer, Rejected)
    assert "repeated" in answer.reason


def test_a_late_chunk_of_an_earlier_transfer_leaves_the_new_one_alone(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    old = decode.open(1, [4])
    decode.links.close(1, "aborted")
    assert isinstance(rogue.receive(), Rejected)
    new = decode.open(1, [5])
    payload = b"x" * ROW
    rogue.send(a_chunk(old, payload), payload)
    assert rogue.receive() == Rejected(room=1, transfer=old.transfer, reason="decode has no such room any more")
    assert isinstance(rogue.receive(), Credit)
    rogue.send(a_chunk(new, payload), payload)
    assert isinstance(rogue.receive(), Credit)
    aux = bytes(sum(LAYOUT.aux_bytes))
    digest = checksum(memoryview(aux), transfer=new.transfer, sequence=1)
    rogue.send(End(room=1, transfer=new.transfer, sequence=1, checksum=digest), aux)
    assert rogue.receive() == Accepted(room=1, transfer=new.transfer)
    assert decode.complete == [1]
    assert not any(decode.pool.pages([4]))
    assert decode.pool.pages([5]) == payload


def test_an_unknown_room_is_rejected(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    payload = b"x" * ROW
    announce = Announce(session="", host="", control_port=0, room=99, transfer=1, pages=1, decode_prefix_tokens=0)
    rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Rejected)
    assert decode.links.rejected_messages == 1


def test_a_room_of_another_prefill_is_out_of_reach(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4], prefill="prefill:2")
    payload = b"x" * ROW
    rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Rejected)
    assert not any(decode.pool.copy())
    assert 1 not in decode.failed


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"junk"],
        [b"\x81\xa4type\xa5chunk", b"x"],
        [encode(Credit(chunks=1))],
        [encode(End(room=1, transfer=1, sequence=0, checksum=0))],
        [encode(End(room=1, transfer=1, sequence=0, checksum=0)), b"", b""],
        [bytes(MAX_HEADER_BYTES + 1)],
    ],
)
def test_frames_that_are_no_message_end_the_link_with_its_rooms(
    decode: Decode, rogue: RoguePrefill, frames: list[bytes]
) -> None:
    rogue.connect()
    decode.open(1, [4])
    rogue.send(*frames)
    assert isinstance(rogue.receive(), Refused)
    wait_until(lambda: 1 in decode.failed, "the failure")
    honest = RoguePrefill(decode, name="prefill:2")  # decode is alive
    honest.connect()
    honest.close()


def test_nothing_is_read_before_the_handshake(decode: Decode, rogue: RoguePrefill) -> None:
    announce = decode.open(1, [4])
    payload = b"x" * ROW
    rogue.send(a_chunk(announce, payload), payload)
    answer = rogue.receive()
    assert isinstance(answer, Refused)
    assert "before the handshake" in answer.reason
    assert not any(decode.pool.copy())
    assert 1 not in decode.failed


def test_a_message_over_the_limit_loses_its_connection(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4])
    payload = bytes(decode.links.max_chunk_bytes + 100_000)
    rogue.send(a_chunk(announce, payload), payload)
    wait_until(lambda: 1 in decode.failed, "the failure", timeout_s=5)
    assert "lost the KV connection" in decode.failed[1]


# ---- a decode side that breaks the rules --------------------------------------------------------------------------


class RogueDecode:
    """Speaks the link protocol by hand."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.port = self._socket.bind_to_random_port(f"tcp://{HOST}")
        self._identity = b""

    def receive(self) -> list[bytes]:
        self._identity, *frames = self._socket.recv_multipart()
        return frames

    def is_quiet(self) -> bool:
        """Nothing comes within a tenth of a second, many times what the next chunk would take."""
        return not self._socket.poll(100)

    def send(self, message: FromDecode | bytes) -> None:
        self._socket.send_multipart([self._identity, message if isinstance(message, bytes) else encode(message)])

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def rogue_decode() -> Iterator[RogueDecode]:
    side = RogueDecode()
    yield side
    side.close()


def start_room(prefill: Prefill, decode: Decode, rogue: RogueDecode, pages: int = 3) -> Announce:
    prefill.links.register(decode.registration(link_port=rogue.port))
    announce = decode.open(1, list(range(pages)))
    prefill.links.announce(announce)
    prefill.send(1, list(range(pages)))
    assert len(rogue.receive()) == 1  # hello
    return announce


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"junk", "no message of the KV protocol"),
        (Credit(chunks=5), "credit for 5 chunks"),
        (Welcome(credit_chunks=0), "out of turn or empty"),
        (Refused(reason="no thanks"), "refused: no thanks"),
    ],
)
def test_a_bad_answer_to_the_handshake_fails_the_room(
    prefill: Prefill, decode: Decode, rogue_decode: RogueDecode, answer: FromDecode | bytes, expected: str
) -> None:
    start_room(prefill, decode, rogue_decode)
    rogue_decode.send(answer)
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert expected in prefill.failed[1]


def test_no_chunk_is_sent_without_credit(prefill: Prefill, decode: Decode, rogue_decode: RogueDecode) -> None:
    start_room(prefill, decode, rogue_decode, pages=12)
    rogue_decode.send(Welcome(credit_chunks=1))
    assert len(rogue_decode.receive()) == 2
    assert rogue_decode.is_quiet()
    rogue_decode.send(Credit(chunks=2))
    assert len(rogue_decode.receive()) == 2


def test_an_acknowledgement_before_the_end_fails_the_room(
    prefill: Prefill, decode: Decode, rogue_decode: RogueDecode
) -> None:
    announce = start_room(prefill, decode, rogue_decode, pages=12)
    rogue_decode.send(Welcome(credit_chunks=1))
    rogue_decode.receive()
    rogue_decode.send(Accepted(room=1, transfer=announce.transfer))
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert "still streaming" in prefill.failed[1]
    assert prefill.delivered == []


@pytest.mark.parametrize("is_welcome", [True, False])
def test_a_silent_decode_fails_the_room_in_time(decode: Decode, rogue_decode: RogueDecode, is_welcome: bool) -> None:
    side = Prefill(KvSettings(chunk_bytes=200, handshake_timeout_s=0.2, stall_timeout_s=0.2))
    start_room(side, decode, rogue_decode)
    if is_welcome:
        rogue_decode.send(Welcome(credit_chunks=1))
    wait_until(lambda: 1 in side.failed, "the failure", timeout_s=5)
    assert ("has taken no KV" if is_welcome else "did not answer the KV handshake") in side.failed[1]
    side.links.close()


# ---- our own bugs ------------------------------------------------------------------------------------------------


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
