"""How far a device may run behind the thread that feeds it, so that a boundary stops what it is meant to stop.

A launch on a GPU returns before the work is done. Without a bound the host would have queued a whole prefill within
milliseconds, and a task that stops at a boundary would go on computing for seconds. So marks (events) are put into the
device's queue every few boundaries, and before an operator is launched the host waits, asleep, until what is in flight
is predicted to take at most a budget. Neither the device nor its queue is ever waited empty, so the device does not
idle between operators while the host keeps up.

What is in flight belongs to the device and not to a task: whoever launches next waits for what others have launched.

::

    launched ──────────────▶ queue ─────────────────────────▶ executed
      operator k              [k-1][k-2] M [k-3][k-4] M        M reached: all before it has ended
                              └──── at most budget ───┘

``Ledger`` decides, purely; ``RunAheadLimiter`` is the thin shell around it, with marks, clock and sleep passed in;
``InStep`` stands in for both where the host computes itself. All of it runs on the scheduler's thread.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

BUDGET_SHARE: Final = 0.5
"""Of the blocking target: the other half is for the operator that was launched last."""
MARKS_PER_BUDGET: Final = 2
"""How finely the device's progress is known. A mark costs the host some microseconds; at the default target of 2 ms one
is recorded for each half millisecond of predicted work."""
NAP_S: Final = 1e-4
"""Longest sleep between two looks at the marks: a tenth of the default budget, so that a late awakening leaves the
device enough to do."""
SHORTEST_NAP_S: Final = 1e-5
"""Less than a sleep takes by itself."""
LEARNING_RATE: Final = 0.1
"""Of one measured stretch between two marks, in the correction of predictions. Some ten stretches halve an error."""
MAX_LOG_STEP: Final = math.log(2.0)
MAX_LOG_CORRECTION: Final = math.log(32.0)

MarkT = TypeVar("MarkT")


class Cost(NamedTuple):
    """Predicted device seconds, in two parts that are mispredicted for reasons of their own. Also used for the shares
    of one operator in the two parts of a forward pass, which are without unit."""

    attention_s: float
    rest_s: float


NOTHING: Final = Cost(0.0, 0.0)


class Marks(Protocol[MarkT]):
    """Places in the queue of one device's one compute stream."""

    def record(self) -> MarkT:
        """A mark behind everything launched so far."""

    def is_reached(self, mark: MarkT) -> bool:
        """Whether everything before it has ended. Never waits."""

    def wait(self, mark: MarkT) -> None:
        """Return when it is reached. Other threads of the process run meanwhile."""

    def elapsed_s(self, earlier: MarkT, later: MarkT) -> float:
        """Device time between two reached marks."""


@dataclass(slots=True, eq=False)
class Stop:
    """A task gave the thread back with work of its own in flight."""

    stopped_at: float
    """By the host's clock."""
    ended_at: float | None = None
    """When the device had ended that work, by the same clock; None: not yet. At most one nap late."""


@dataclass(slots=True, eq=False)
class _Stretch(Generic[MarkT]):
    """The work between two successive marks; ``mark`` is at its end."""

    mark: MarkT
    cost: Cost
    predicted_s: float
    is_gapless: bool
    """Whether the device was still busy with what is before it when all of it had been launched: then the time between
    the two marks is this work's own."""
    stops: list[Stop]


class Ledger(Generic[MarkT]):
    """What was launched and not seen to end, and when it is predicted to end. Pure: every ``now`` is passed in."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._spacing_s = budget_s / MARKS_PER_BUDGET
        self._launched = NOTHING  # since the last look: in the queue from the next look on
        self._tail = NOTHING  # behind the last mark
        self._tail_s = 0.0
        self._open: deque[_Stretch[MarkT]] = deque()
        self._behind_head_s = 0.0  # of all open stretches but the first, and the tail
        self._free_at = -math.inf  # when the device is predicted to be done
        self._reached_at: float | None = None
        self._last_reached: MarkT | None = None
        self._logs = [0.0, 0.0]
        self._factors = Cost(1.0, 1.0)

    @property
    def factors(self) -> Cost:
        """Measured over predicted time, of attention and of the rest, as learned so far."""
        return self._factors

    @property
    def oldest(self) -> MarkT | None:
        """The first mark that was not seen to be reached."""
        return self._open[0].mark if self._open else None

    @property
    def last_reached(self) -> MarkT | None:
        """The mark before ``oldest``; None before the first was reached."""
        return self._last_reached

    @property
    def wants_mark(self) -> bool:
        """Whether enough is in the queue behind the last mark."""
        return self._tail_s > 0 and self._tail_s >= self._spacing_s

    def launched(self, cost: Cost) -> None:
        """An operator is about to be launched."""
        self._launched = Cost(self._launched.attention_s + cost.attention_s, self._launched.rest_s + cost.rest_s)

    def queued(self, now: float) -> None:
        """What was launched is in the queue by now. It is taken to begin now where the device was idle, though it has
        begun before: what is in flight must not be thought less than it is."""
        cost, self._launched = self._launched, NOTHING
        seconds = cost.attention_s * self._factors.attention_s + cost.rest_s * self._factors.rest_s
        if seconds <= 0:
            return
        self._free_at = max(self._free_at, now) + seconds
        self._tail = Cost(self._tail.attention_s + cost.attention_s, self._tail.rest_s + cost.rest_s)
        self._tail_s += seconds
        self._behind_head_s += seconds

    def marked(self, mark: MarkT, *, is_gapless: bool) -> None:
        """``mark`` was recorded behind everything queued. ``is_gapless``: the mark before it was not reached then."""
        if not self._open:
            self._behind_head_s = 0.0
        self._open.append(_Stretch(mark, self._tail, self._tail_s, is_gapless, []))
        self._tail, self._tail_s = NOTHING, 0.0

    def reached(self, now: float, took_s: float | None) -> None:
        """``oldest`` was seen to be reached. ``took_s``: device time since the mark before; None for the first."""
        stretch = self._open.popleft()
        at = now
        if took_s is not None and self._reached_at is not None:
            at = min(now, self._reached_at + took_s)
        if took_s is not None and stretch.is_gapless:
            self._learn(stretch, took_s)
        self._reached_at, self._last_reached = at, stretch.mark
        for stop in stretch.stops:
            stop.ended_at = max(at, stop.stopped_at)
        self._free_at = now + self._behind_head_s
        if self._open:
            self._behind_head_s -= self._open[0].predicted_s

    def stopped(self, now: float) -> Stop:
        """A task has given the thread back. Its last work is in front of the newest mark, which is still open."""
        stop = Stop(now)
        self._open[-1].stops.append(stop)
        return stop

    def in_flight_s(self, now: float) -> float:
        """Predicted device seconds of what was queued and has not ended. Work that takes longer than predicted counts
        as about to end until its mark is reached, what is behind it in full."""
        if self._open:
            return max(self._free_at - now, self._behind_head_s)
        return max(self._free_at - now, 0.0)

    def excess_s(self, now: float) -> float:
        """How long until the next operator may be launched, as predicted; 0 or less: now."""
        return self.in_flight_s(now) - self.budget_s

    def _learn(self, stretch: _Stretch[MarkT], took_s: float) -> None:
        """Normalised least mean squares on the logarithms of the two factors, as ``core.prefill_cost.Predictor``."""
        parts = [cost * factor for cost, factor in zip(stretch.cost, self._factors, strict=True)]
        predicted_s = sum(parts)
        if not (predicted_s > 0 and 0 < took_s < math.inf):
            return
        shares = [part / predicted_s for part in parts]
        error = max(-MAX_LOG_STEP, min(MAX_LOG_STEP, math.log(took_s / predicted_s)))
        step = LEARNING_RATE * error / sum(share * share for share in shares)
        self._logs = [
            max(-MAX_LOG_CORRECTION, min(MAX_LOG_CORRECTION, log + step * share))
            for log, share in zip(self._logs, shares, strict=True)
        ]
        self._factors = Cost(*map(math.exp, self._logs))


class RunAhead(Protocol):
    """What the loop and the gate tell whatever keeps the device near."""

    is_short: bool
    """Whether the running task is predicted to end within the blocking target, so that nobody needs to stop it."""

    def runs(self, cost: Cost) -> None:
        """A task is about to run: what its whole forward pass is predicted to take on the device."""

    def hold(self, is_wanted: Callable[[], bool]) -> None:
        """Before an operator: return when it may be launched, or as soon as ``is_wanted`` says that the thread is
        wanted elsewhere."""

    def launched(self, operator: object, part: float) -> None:
        """This operator, or a part of it, is launched next."""

    def stopped(self, *, has_ended: bool) -> float:
        """The task gave the thread back: the time of it, for a task that has ended the time when the device had."""

    @property
    def last_stop(self) -> Stop | None:
        """The last time that a task was suspended; None where the device stops with the host."""

    def look(self) -> None:
        """Find out what has ended since."""

    def drain(self) -> None:
        """Wait until the device has nothing left that a task has launched."""


class InStep:
    """The host computes itself: what was launched has ended."""

    def __init__(self, short_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._short_s = short_s
        self._clock = clock
        self.is_short = False

    def runs(self, cost: Cost) -> None:
        """Notes whether the task is short."""
        self.is_short = sum(cost) <= self._short_s

    def hold(self, is_wanted: Callable[[], bool]) -> None:
        """Returns at once."""

    def launched(self, operator: object, part: float) -> None:
        """Does nothing."""

    def stopped(self, *, has_ended: bool) -> float:
        """Now."""
        return self._clock()

    @property
    def last_stop(self) -> Stop | None:
        """None."""
        return None

    def look(self) -> None:
        """Does nothing."""

    def drain(self) -> None:
        """Returns at once."""


class RunAheadLimiter(Generic[MarkT]):
    """Keeps what is in flight on one device within a budget. Owned by the scheduler's thread."""

    def __init__(
        self,
        marks: Marks[MarkT],
        shares: Mapping[object, Cost],
        *,
        max_blocking_s: float,
        budget_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``shares``: what each operator is of a forward pass; one that is not in it counts as nothing. ``budget_s``
        replaces the share of the blocking target: 0 waits for the device at every boundary, which is how the paper's
        implementation stops, and infinity never does. Both are there to be compared with."""
        self._marks = marks
        self._shares = shares
        self._short_s = max_blocking_s
        self._clock = clock
        self._sleep = sleep
        self._ledger: Ledger[MarkT] = Ledger(BUDGET_SHARE * max_blocking_s if budget_s is None else budget_s)
        self._cost = NOTHING
        self._last_mark: MarkT | None = None
        self._stop: Stop | None = None
        self.is_short = False

    @property
    def ledger(self) -> Ledger[MarkT]:
        """For instruments and tests."""
        return self._ledger

    def runs(self, cost: Cost) -> None:
        """A task starts, or goes on."""
        self._cost = cost
        self.is_short = sum(cost) <= self._short_s

    def hold(self, is_wanted: Callable[[], bool]) -> None:
        """Sleep as long as more than the budget is in flight. A short task waits for nothing: with all that it launches
        it stays within the blocking target."""
        ledger, now = self._ledger, self._clock()
        ledger.queued(now)
        if ledger.budget_s == 0:
            self.drain()
            return
        if ledger.wants_mark:
            self._mark()
        if self._stop is not None and self._stop.ended_at is None:
            self._look(now)
        if self.is_short:
            return
        while ledger.excess_s(now) > 0:
            self._look(now)
            excess_s = ledger.excess_s(now)
            if excess_s <= 0 or is_wanted():
                return
            self._sleep(min(max(excess_s, SHORTEST_NAP_S), NAP_S))
            now = self._clock()

    def launched(self, operator: object, part: float) -> None:
        """Counted from the next boundary on."""
        share = self._shares.get(operator)
        if share is not None:
            cost = self._cost
            self._ledger.launched(Cost(cost.attention_s * share.attention_s * part, cost.rest_s * share.rest_s * part))

    def stopped(self, *, has_ended: bool) -> float:
        """For a task that was suspended: now, while up to the budget and one operator of it are still in flight."""
        # Behind a mark of its own: sampling and copies have no boundary and no cost.
        now = self._clock()
        self._ledger.queued(now)
        self._mark()
        if has_ended:
            self._wait_for_all()
            return self._clock()
        self._stop = self._ledger.stopped(now)
        self._look(now)
        return now

    @property
    def last_stop(self) -> Stop | None:
        """See ``RunAhead``."""
        return self._stop

    def look(self) -> None:
        """See ``RunAhead``."""
        self._look(self._clock())

    def drain(self) -> None:
        """See ``RunAhead``."""
        self._ledger.queued(self._clock())
        self._mark()
        self._wait_for_all()

    def _mark(self) -> None:
        last = self._last_mark
        is_gapless = last is not None and not self._marks.is_reached(last)
        self._last_mark = self._marks.record()
        self._ledger.marked(self._last_mark, is_gapless=is_gapless)

    def _wait_for_all(self) -> None:
        if self._last_mark is not None:
            self._marks.wait(self._last_mark)
            self.look()

    def _look(self, now: float) -> None:
        """Take in every mark that is reached."""
        ledger, marks = self._ledger, self._marks
        while (mark := ledger.oldest) is not None and marks.is_reached(mark):
            before = ledger.last_reached
            ledger.reached(now, None if before is None else marks.elapsed_s(before, mark))
