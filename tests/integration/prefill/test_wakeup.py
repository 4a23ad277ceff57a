"""Nothing that happens on another thread is slept through, forgotten or taken twice."""

import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from sglang.srt.disaggregation.base.conn import KVPoll

from flowprefill_sglang.integration.prefill import wakeup
from flowprefill_sglang.integration.prefill.wakeup import Doorbell, News, Pace, Taken, Wakeup
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.ranks import Alone, RoomChanged, WakeUp
from flowprefill_sglang.prefill_worker.ranks import News as RankNews
from flowprefill_testing.gates import Clock, stops

LONG_S = 20.0
"""A sleep that only a wake-up ends before the test's own patience does."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(clock)


@pytest.fixture
def bed(gate: Gate, clock: Clock) -> Iterator[Wakeup]:
    bed = Wakeup([], gate, clock)
    yield bed
    bed.close()


def seconds(function, *arguments: object) -> float:
    began_at = time.monotonic()
    function(*arguments)
    return time.monotonic() - began_at


def test_a_call_before_the_sleep_is_not_lost(bed: Wakeup, gate: Gate) -> None:
    bed.clear()
    bed.now_please()
    assert seconds(bed.wait, LONG_S) < 1


def test_the_first_of_a_burst_stops_at_once_and_the_others_together(bed: Wakeup, gate: Gate, clock: Clock) -> None:
    bed.pace.arrived(objective_s=0.5)  # so 5 ms
    bed.clear()
    clock.now += 0.005
    bed.now_please()
    assert gate.is_raised
    bed.clear()  # the loop has had its look
    bed.now_please()
    clock.now += 0.004
    bed.now_please()
    assert not gate.is_raised
    assert not stops(gate)
    clock.now += 0.001
    assert stops(gate)


def test_a_sleeping_loop_gets_up_for_each_of_a_burst(bed: Wakeup) -> None:
    for _ in range(3):
        bed.clear()
        bed.now_please()
        assert seconds(bed.wait, LONG_S) < 1


def test_the_pace_is_that_of_the_tightest_objective_of_late() -> None:
    pace = Pace()
    assert pace.spacing_s == wakeup.MAY_WAIT_S  # nobody has come yet
    pace.arrived(600)
    assert pace.spacing_s == wakeup.MAY_WAIT_S
    pace.arrived(0.25)
    pace.arrived(600)
    assert pace.spacing_s == pytest.approx(0.0025)
    arrivals = 0
    while pace.spacing_s < wakeup.MAY_WAIT_S:
        pace.arrived(600)
        arrivals += 1
    assert 256 <= arrivals <= 512


def test_a_call_during_the_sleep_ends_it(bed: Wakeup) -> None:
    asleep = threading.Event()
    slept: list[float] = []

    def sleep() -> None:
        asleep.set()
        slept.append(seconds(bed.wait, LONG_S))

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    assert asleep.wait(5)
    bed.now_please()
    sleeper.join(LONG_S)
    assert slept[0] < LONG_S / 2


def test_what_is_cleared_does_not_wake_again(bed: Wakeup, gate: Gate) -> None:
    for _ in range(3):
        bed.now_please()
    bed.clear()
    assert not gate.is_raised
    assert seconds(bed.wait, 0.05) >= 0.04
    bed.clear()  # with nothing to forget


def test_a_message_wakes_until_it_is_read(gate: Gate) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        for socket in (inbox, outbox):
            socket.linger = 0
        outbox.connect(f"tcp://127.0.0.1:{inbox.bind_to_random_port('tcp://127.0.0.1')}")
        bed = Wakeup([inbox], gate)
        try:
            outbox.send(b"one")
            outbox.send(b"two")
            assert seconds(bed.wait, LONG_S) < LONG_S / 2
            assert inbox.recv() == b"one"
            bed.clear()
            assert seconds(bed.wait, LONG_S) < LONG_S / 2, "a second message is still there"
            assert inbox.recv() == b"two"
            assert seconds(bed.wait, 0.05) >= 0.04
        finally:
            bed.close()


# ---- handoffs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def events(bed: Wakeup) -> News:
    events = News()
    events.listen(bed)
    return events


def test_a_request_stops_the_running_task_once_its_message_and_its_decode_instance_are_there(
    events: News, gate: Gate, bed: Wakeup
) -> None:
    events.message_came()
    assert not stops(gate), "the message alone changes no decision"
    events.changed(7, KVPoll.WaitingForInput)
    assert stops(gate)
    assert seconds(bed.wait, LONG_S) < 1


def test_the_message_may_be_last(events: News, gate: Gate) -> None:
    events.changed(7, KVPoll.WaitingForInput)
    assert not stops(gate)
    events.message_came()
    assert stops(gate)


def test_a_request_that_the_loop_has_taken_waits_for_its_decode_instance_alone(
    events: News, gate: Gate, bed: Wakeup
) -> None:
    events.awaited = frozenset({7})
    events.changed(8, KVPoll.WaitingForInput)
    assert not stops(gate)
    events.changed(7, KVPoll.WaitingForInput)
    assert stops(gate)
    assert seconds(bed.wait, LONG_S) < 1


def test_a_message_alone_stops_the_running_task_after_a_while(events: News, gate: Gate, clock: Clock) -> None:
    """It may be a control request."""
    events.message_came()
    clock.now += wakeup.MAY_WAIT_S / 2
    assert not stops(gate)
    clock.now += wakeup.MAY_WAIT_S
    assert stops(gate)


def test_a_failure_stops_the_running_task(events: News, gate: Gate, bed: Wakeup) -> None:
    events.changed(7, KVPoll.Failed)
    assert stops(gate)
    assert seconds(bed.wait, LONG_S) < 1


def test_a_handoff_that_ended_well_stops_the_running_task_when_memory_is_short(events: News, gate: Gate) -> None:
    events.is_memory_short = True
    events.changed(7, KVPoll.Success)
    assert stops(gate)


def test_a_handoff_that_ended_well_can_wait_when_it_is_not(events: News, gate: Gate, bed: Wakeup, clock: Clock) -> None:
    events.changed(7, KVPoll.Success)
    clock.now += wakeup.ENDED_MAY_WAIT_S / 2
    assert not stops(gate)
    clock.now += wakeup.ENDED_MAY_WAIT_S
    assert stops(gate)
    assert seconds(bed.wait, LONG_S) < 1, "an idle loop gets up for it at once"


@pytest.mark.parametrize("status", [KVPoll.Bootstrapping, KVPoll.Transferring])
def test_changes_that_call_for_nothing_do_not(events: News, gate: Gate, status: KVPoll) -> None:
    events.changed(7, status)
    assert not gate.is_raised


def test_when_a_room_became_ready_is_kept_until_it_ends(events: News) -> None:
    before = time.monotonic()
    events.changed(7, KVPoll.WaitingForInput)
    events.changed(8, KVPoll.WaitingForInput)
    assert before <= events.ready_at[7] <= time.monotonic()
    events.changed(7, KVPoll.Success)
    events.changed(8, KVPoll.Failed)
    assert not events.ready_at, "of a room whose request never came, too"
    assert events.has_failure
    assert events.ended_at is not None


def test_a_failure_is_not_lost_to_a_success(events: News) -> None:
    events.changed(8, KVPoll.Failed)
    events.changed(7, KVPoll.Success)
    assert events.has_failure


def test_rooms_that_nobody_asks_for_do_not_pile_up(events: News) -> None:
    for room in range(3 * wakeup.MAX_READY_ROOMS):
        events.changed(room, KVPoll.WaitingForInput)
    assert len(events.ready_at) <= wakeup.MAX_READY_ROOMS
    assert 3 * wakeup.MAX_READY_ROOMS - 1 in events.ready_at, "the newest are kept"


def test_without_a_loop_nothing_is_kept(events: News, gate: Gate) -> None:
    events.changed(7, KVPoll.WaitingForInput)
    gate.clear()
    events.listen(None)
    assert not events.ready_at
    for status in (KVPoll.WaitingForInput, KVPoll.Success):
        events.changed(7, status)
    assert not gate.is_raised
    assert not events.ready_at


# ---- tensor parallelism ---------------------------------------------------------------------------------------------


class Group(Alone):
    """One rank of two, which keeps what it is to tell the other."""

    count = 2

    def __init__(self, *, leads: bool) -> None:
        super().__init__()
        self.leads = leads
        self.told: list[RankNews] = []

    def tell(self, news: RankNews) -> None:
        self.told.append(news)


@pytest.fixture
def leaders(bed: Wakeup) -> News:
    leaders = News()
    leaders.listen(bed, Group(leads=True))
    leaders.awaited = frozenset({7})
    return leaders


def test_a_room_is_ready_once_it_is_on_every_rank(leaders: News, gate: Gate, bed: Wakeup) -> None:
    leaders.changed(7, KVPoll.WaitingForInput)
    assert not stops(gate)
    leaders.heard(1, RoomChanged(7, int(KVPoll.WaitingForInput)))
    assert stops(gate)
    assert seconds(bed.wait, LONG_S) < 1


def test_the_leader_may_be_the_last(leaders: News, gate: Gate) -> None:
    leaders.heard(1, RoomChanged(7, int(KVPoll.WaitingForInput)))
    assert not stops(gate)
    leaders.changed(7, KVPoll.WaitingForInput)
    assert stops(gate)


def test_a_room_that_failed_on_one_rank_has_failed(leaders: News, gate: Gate) -> None:
    leaders.heard(1, RoomChanged(7, int(KVPoll.Failed)))
    assert stops(gate)
    assert leaders.take().has_failure


def test_a_handoff_has_ended_once_it_has_on_every_rank(leaders: News) -> None:
    leaders.changed(7, KVPoll.Success)
    assert leaders.take().ended_at is None
    leaders.heard(1, RoomChanged(7, int(KVPoll.Success)))
    assert leaders.take().ended_at is not None


@pytest.mark.parametrize("is_urgent", [True, False])
def test_a_follower_can_wake_the_leader(leaders: News, gate: Gate, bed: Wakeup, is_urgent: bool) -> None:
    leaders.heard(1, WakeUp(is_urgent))
    assert stops(gate) is is_urgent
    assert seconds(bed.wait, LONG_S) < 1


def test_a_lost_rank_stops_the_running_task(leaders: News, gate: Gate) -> None:
    leaders.rank_lost()
    assert stops(gate)


def test_a_follower_tells_the_leader_and_does_nothing_itself(gate: Gate) -> None:
    group = Group(leads=False)
    bed, followers = Wakeup([], gate, ranks=group), News()
    try:
        followers.listen(bed, group)
        for status in (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success):
            followers.changed(7, status)
        bed.now_please()
        assert group.told == [RoomChanged(7, 2), RoomChanged(7, 4), WakeUp(is_urgent=True)]
        assert nothing(followers.take())
        assert seconds(bed.wait, LONG_S) < 1, "it sleeps where it waits for the leader"
    finally:
        bed.close()


def test_what_was_taken_is_no_news_any_more(events: News) -> None:
    events.message_came()
    events.changed(7, KVPoll.Failed)
    taken = events.take()
    assert (taken.has_message, taken.has_failure) == (True, True)
    assert taken.ended_at is not None
    assert nothing(events.take())


def nothing(taken: Taken) -> bool:
    return not taken.has_message and not taken.has_failure and taken.ended_at is None


# ---- hooks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_this_process(bed: Wakeup) -> Iterator[None]:
    wakeup.news.listen(bed)
    yield
    wakeup.news.listen(None)


@pytest.mark.usefixtures("of_this_process")
def test_every_status_change_of_a_manager_is_seen(gate: Gate) -> None:
    after_update_status = wakeup.hooks()[0].function
    wakeup.news.awaited = frozenset({7})
    assert after_update_status(None, object(), 7, KVPoll.WaitingForInput) is None
    assert 7 in wakeup.news.ready_at
    assert gate.is_raised


def test_the_doorbell_rings_for_every_message_that_comes_after_the_socket_was_emptied() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind("inproc://doorbell")
    push.connect("inproc://doorbell")
    rung = threading.Event()
    bell = Doorbell([pull], rung.set)
    try:
        for number in range(200):
            rung.clear()
            while pull.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                pull.recv()
            push.send(b"%d" % number)
            assert rung.wait(LONG_S), f"message {number} did not ring"
            assert pull.recv() == b"%d" % number
    finally:
        bell.close()
        context.destroy(linger=0)


def test_a_closed_doorbell_leaves_no_thread() -> None:
    before = threading.active_count()
    bell = Doorbell([], lambda: None)
    assert threading.active_count() == before + 1
    bell.close()
    assert threading.active_count() == before
