"""Links whose other side dies, is not there, or ends."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading

import msgspec
import pytest

from flowprefill_testing.kv_link_pair import (
    PREFILL,
    Decode,
    Prefill,
    receive_until_killed,
    stream_until_killed,
    transfer,
    wait_until,
)
from flowprefill_testing.kv_rogues import RoguePrefill
from flowprefill_testing.servers import with_support


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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | with_support(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "under way\n", "")
