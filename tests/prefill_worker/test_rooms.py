"""A room is ready, or over, once every rank has said so."""

from __future__ import annotations

from flowprefill_sglang.prefill_worker.rooms import RoomReports

READY, DONE = 2, 4


def test_the_last_rank_counts() -> None:
    reports = RoomReports(ranks=3, capacity=10)
    assert not reports.is_last(0, 7, READY)
    assert not reports.is_last(2, 7, READY)
    assert not reports.is_last(2, 7, READY), "said twice"
    assert not reports.is_last(1, 7, DONE), "another status"
    assert not reports.is_last(1, 8, READY), "another room"
    assert reports.is_last(1, 7, READY)
    assert not reports.is_last(1, 7, READY), "and it begins anew"


def test_one_rank_is_always_the_last() -> None:
    reports = RoomReports(ranks=1, capacity=1)
    assert all(reports.is_last(0, room, READY) for room in range(3))


def test_a_failed_room_is_forgotten() -> None:
    reports = RoomReports(ranks=2, capacity=10)
    reports.is_last(0, 7, READY)
    reports.is_last(0, 8, READY)
    reports.forget(7)
    assert not reports.is_last(1, 7, READY)
    assert reports.is_last(1, 8, READY)


def test_rooms_that_some_ranks_never_hear_of_do_not_pile_up() -> None:
    reports = RoomReports(ranks=2, capacity=3)
    for room in range(100):
        assert not reports.is_last(0, room, READY)
    assert not reports.is_last(1, 0, READY)
    assert reports.is_last(1, 99, READY)
