"""Ranks take the leader's word, and say so when they have parted or one is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import msgspec
import pytest

from flowprefill_sglang.errors import InternalError, PeerFault
from flowprefill_sglang.prefill_worker.ranks import Alone, Follower, Leader, News, RoomChanged, WakeUp


class Taken(msgspec.Struct, frozen=True, array_like=True):
    has_message: bool
    ended_at: float | None


Trio = tuple[Leader, Follower, Follower]


@pytest.fixture
def trio() -> Iterator[Trio]:
    ends = {rank: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for rank in (1, 2)}
    leader = Leader({rank: pair[0] for rank, pair in ends.items()}, clock=lambda: 12.5)
    followers = [Follower(rank, 3, pair[1]) for rank, pair in ends.items()]
    yield leader, followers[0], followers[1]
    for ours, theirs in ends.values():
        ours.close()
        theirs.close()


def test_all_have_the_leaders_value(trio: Trio) -> None:
    leader, *followers = trio
    said = Taken(True, 3.25)
    assert leader.agree("turn", said) == said
    assert leader.now() == 12.5
    for follower in followers:
        assert follower.agree("turn", Taken(False, None)) == said
        assert follower.now() == 12.5


def test_a_follower_sleeps_until_the_leader_has_spoken(trio: Trio) -> None:
    leader, follower, _ = trio
    heard: Future[float] = Future()
    threading.Thread(target=lambda: heard.set_result(follower.now()), daemon=True).start()
    with pytest.raises(TimeoutError):
        heard.result(0.05)
    leader.now()
    assert heard.result(10) == 12.5


def test_what_ranks_agree_on_is_compared(trio: Trio) -> None:
    leader, first, second = trio
    leader.confirm("run", (3, 800, 2))
    first.confirm("run", (3, 800, 2))
    with pytest.raises(InternalError, match=r"rank 2 has parted .* run is \[4, 800, 2\] here and \[3, 800, 2\] there"):
        second.confirm("run", (4, 800, 2))


def test_ranks_at_different_places_are_found_out(trio: Trio) -> None:
    leader, follower, _ = trio
    leader.confirm("run", 1)
    with pytest.raises(InternalError, match="it asks for 'now' and hears of 'run'"):
        follower.now()


def test_a_followers_news_reach_the_leader(trio: Trio) -> None:
    leader, first, second = trio
    heard: list[tuple[int, News]] = []
    came = threading.Semaphore(0)

    def hear(rank: int, news: News) -> None:
        heard.append((rank, news))
        came.release()

    leader.listen(hear, lambda: None)
    first.tell(RoomChanged(1 << 62, 2))
    assert came.acquire(timeout=10)
    second.tell(WakeUp(is_urgent=True))
    assert came.acquire(timeout=10)
    assert heard == [(1, RoomChanged(1 << 62, 2)), (2, WakeUp(is_urgent=True))]
    leader.check()  # which leaves the thread what it has to read
    leader.close()


def test_a_lost_follower_is_reported_and_found_out(trio: Trio) -> None:
    leader, first, second = trio
    lost = threading.Event()
    leader.listen(lambda rank, news: None, lost.set)
    second.close()
    assert lost.wait(10)
    with pytest.raises(PeerFault, match="rank 2 of this worker has ended"):
        leader.check()
    with pytest.raises(PeerFault, match="rank 2 of this worker has ended"):
        leader.now()
    with pytest.raises(PeerFault, match="it has ended, or has lost another rank"):
        first.check()
    leader.close()


def test_a_leader_that_has_ended_is_seen_behind_what_it_said(trio: Trio) -> None:
    leader, follower, _ = trio
    leader.now()
    follower.check()
    leader.close()
    with pytest.raises(PeerFault, match="rank 0"):
        follower.check()
    assert follower.now() == 12.5


def test_a_follower_outlives_no_leader(trio: Trio) -> None:
    leader, first, second = trio
    waiting: Future[float] = Future()

    def wait() -> None:
        try:
            waiting.set_result(first.now())
        except PeerFault as error:
            waiting.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    leader.close()
    with pytest.raises(PeerFault, match="the leader of this tensor-parallel worker, rank 0, has hung up"):
        waiting.result(10)
    with pytest.raises(PeerFault, match="rank 0"):
        second.check()
    second.tell(WakeUp(is_urgent=False))  # nobody hears it, and nothing happens


def test_one_rank_is_its_own_leader() -> None:
    alone = Alone(clock=lambda: 7.0)
    assert alone.agree("turn", "mine") == "mine"
    assert (alone.now(), alone.leads, alone.count) == (7.0, True, 1)
