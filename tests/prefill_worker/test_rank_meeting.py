"""Ranks find each other, and leave nothing behind."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.prefill_worker import rank_meeting
from flowprefill_sglang.prefill_worker.lease import FollowerLease, LeaderLease
from flowprefill_sglang.prefill_worker.rank_meeting import follow, lead
from flowprefill_sglang.prefill_worker.ranks import Follower, Leader


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def leader_of(count: int, paths: Future[str | None]) -> Future[tuple[Leader, LeaderLease]]:
    met: Future[tuple[Leader, LeaderLease]] = Future()

    def run() -> None:
        try:
            met.set_result(lead(count, paths.set_result))
        except StartupError as error:
            met.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return met


def test_three_ranks_share_memory_and_speak(folder: Path) -> None:
    paths: Future[str | None] = Future()
    met = leader_of(3, paths)
    path = paths.result(10)
    followers: list[tuple[Follower, FollowerLease]] = [follow(rank, 3, path) for rank in (2, 1)]
    leader, lease = met.result(10)
    assert leader.agree("turn", 5) == 5
    lease.begin()
    assert not lease.cross(False, kind=1)
    assert lease.cross(True, kind=2)
    lease.end()
    for follower, followers_lease in followers:
        assert follower.agree("turn", 0) == 5
        followers_lease.begin()
        assert [followers_lease.cross(False, kind) for kind in (1, 2)] == [False, True]
        followers_lease.end()
    lease.begin()
    for rank in (leader, *(follower for follower, _ in followers)):
        rank.close()
    assert list(folder.iterdir()) == []


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_meeting, "MEETING_S", 0.2)
    paths: Future[str | None] = Future()
    met = leader_of(3, paths)
    follower, _ = follow(2, 3, paths.result(10))
    with pytest.raises(StartupError, match=r"of 2 ranks only \[2\] have reached their leader"):
        met.result(10)
    follower.close()


def test_a_folder_that_is_too_deep_for_a_socket_is_said_on_all_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    paths: Future[str | None] = Future()
    met = leader_of(2, paths)
    assert paths.result(10) is None
    with pytest.raises(StartupError, match="set TMPDIR"):
        met.result(10)
    with pytest.raises(StartupError, match="its log says why"):
        follow(1, 2, None)


def test_a_leader_that_is_gone_is_said(folder: Path) -> None:
    with pytest.raises(StartupError, match="cannot reach the leader"):
        follow(1, 2, str(folder / "ranks"))
