"""A lease on boundaries: how the ranks of one tensor-parallel group stop at the same boundary, without a barrier.

Every rank runs the same operators in the same order, and most of them end in a collective. A rank that stopped one
operator later than another would leave that one alone in a collective, for ever. So one rank, the leader, decides, and
the others, its followers, never pass a boundary that it has not granted::

    leader at boundary k     nothing has happened: granted = k + lookahead, go on
                             an event:             stop = granted + 1, grant no more, suspend there
    follower at boundary k   granted >= k: go on     stop == k: suspend     else: wait

Boundaries are counted from 1 in each *stretch*, from one resume of a task to its next stop or its end; stretches are
counted from 1 too, on all ranks, and every word carries its stretch's number (the *epoch*), so that a word of an
earlier stretch is never taken for one of this. Before the leader opens a stretch it waits until every follower has
closed the one before, and compares what they did: how many boundaries, of which operators, in which order. A follower
that has done anything else ends the worker with an error; it could only hang later.

Memory: one word for what is granted, one for the stop, two for each follower's report. Each is written by one rank only
and read by the others. It is enough that an aligned 8-byte store becomes visible whole, and at some time: every word
says all by itself, so the order in which two words become visible does not matter. x86-64 and 64-bit ARM give that,
and CPython's ``memoryview`` stores a word of format ``Q`` with one such instruction (a ``memcpy`` of constant size).

Pure: no shared memory, no clock and no process here. ``patience`` says how to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from flowprefill_sglang.errors import InternalError

LOOKAHEAD: Final = 0
"""How many boundaries beyond its own the leader grants. Each is one more operator that an urgent request waits for;
what it saves is a follower's wait where it is ahead of the leader, and the next collective would make it wait anyway.
"""

_SPACING: Final = 8  # words: a cache line each, so that a rank that writes does not slow down those that read others
_GRANTED: Final = 0
_STOP: Final = 1
_REPORTS: Final = 2
_LOW: Final = 0xFFFF_FFFF

Wait = Callable[[int], None]
"""Called each time that a word is not yet what a rank waits for, with how often it was before. Returns when it is time
to look again; raises when there is nothing left to wait for."""


class Words(Protocol):
    """Memory that the ranks share: 64-bit words, zero at first."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


def words_for(followers: int) -> int:
    """How many words a lease of so many followers takes."""
    return _SPACING * (_REPORTS + 2 * followers)


class Lease(Protocol):
    """What a gate (``boundaries``) asks at every boundary of a group of ranks."""

    def begin(self) -> None:
        """A task is about to run on this rank."""

    def cross(self, wants_stop: bool, kind: int) -> bool:
        """Whether the task stops at this boundary. ``wants_stop``: this rank has an event; ``kind``: of operator."""

    def cannot_stop(self) -> None:
        """It cannot, on any rank, since a region was entered that must not be left; it goes on."""

    def end(self) -> None:
        """The task has stopped or ended."""


class _Stretch:
    """What a rank counts."""

    def __init__(self) -> None:
        self.epoch = 0
        self.index = 0  # of the last boundary
        self.digest = 0  # of the operators so far

    def next(self) -> None:
        self.epoch += 1
        self.index = self.digest = 0

    def step(self, kind: int) -> None:
        self.index += 1
        self.digest = (self.digest * 31 + kind + 1) & _LOW

    def word(self, low: int) -> int:
        return self.epoch << 32 | low


class LeaderLease:
    """The leader's end. Owned by the thread that runs its tasks."""

    def __init__(self, words: Words, followers: int, patience: Wait, lookahead: int = LOOKAHEAD) -> None:
        self._words = words
        self._followers = followers
        self._patience = patience
        self._lookahead = lookahead
        self._at = _Stretch()
        self._granted = 0
        self._stop: int | None = None

    def begin(self) -> None:
        """Raises InternalError when a follower has not done what this rank has done, and what ``patience`` raises."""
        for follower in range(self._followers):
            self._compare(follower)
        self._at.next()
        self._granted, self._stop = 0, None

    def cross(self, wants_stop: bool, kind: int) -> bool:
        """Whether the task stops here: ``lookahead`` boundaries after the one at which it was first wanted."""
        at = self._at
        at.step(kind)
        if self._stop is not None:
            return at.index == self._stop
        if not wants_stop:
            self._grant(at.index + self._lookahead)
            return False
        self._stop = self._granted + 1
        self._words[_STOP * _SPACING] = at.word(self._stop)
        return at.index == self._stop

    def cannot_stop(self) -> None:
        """Followers may pass, whether they have seen the stop or not."""
        self._stop = None
        self._grant(self._at.index)

    def end(self) -> None:
        """What was granted reaches to the last boundary that was passed, so no follower waits for more."""

    def _grant(self, index: int) -> None:
        self._granted = index
        self._words[_GRANTED * _SPACING] = self._at.word(index)

    def _compare(self, follower: int) -> None:
        at, tries = self._at, 0
        first = _SPACING * (_REPORTS + 2 * follower)
        while True:
            reports = self._words[first], self._words[first + _SPACING]
            if all(report >> 32 == at.epoch for report in reports):
                break
            if any(report >> 32 > at.epoch for report in reports):
                raise InternalError(f"tensor-parallel rank {follower + 1} is ahead of the leader")
            self._patience(tries)
            tries += 1
        count, digest = (report & _LOW for report in reports)
        if (count, digest) != (at.index, at.digest):
            raise InternalError(
                f"tensor-parallel ranks have run different operators: the leader {at.index} (digest {at.digest:08x}), "
                f"rank {follower + 1} {count} ({digest:08x})"
            )


class FollowerLease:
    """A follower's end. Owned by the thread that runs its tasks."""

    def __init__(self, words: Words, rank: int, patience: Wait) -> None:
        """``rank``: in the group, from 1."""
        self._words = words
        self._first = _SPACING * (_REPORTS + 2 * (rank - 1))
        self._patience = patience
        self._at = _Stretch()
        self._granted = 0  # the last that was seen: a word with its epoch

    def begin(self) -> None:
        """The leader has said that the task runs on."""
        self._at.next()

    def cross(self, wants_stop: bool, kind: int) -> bool:
        """Whether the task stops here; waits until the leader has said so. What this rank wants does not count: the
        leader hears of its events by other ways. Raises what ``patience`` raises."""
        at = self._at
        at.step(kind)
        here = at.word(at.index)
        if self._granted >= here:
            return False
        words, tries = self._words, 0
        while True:
            granted = words[_GRANTED * _SPACING]
            if granted >> 32 > at.epoch:
                raise InternalError("the leader of this tensor-parallel group has gone on without this rank")
            if granted >= here:
                self._granted = granted
                return False
            if words[_STOP * _SPACING] == here:
                return True
            self._patience(tries)
            tries += 1

    def cannot_stop(self) -> None:
        """The leader finds the same at this boundary."""

    def end(self) -> None:
        """Report to the leader."""
        at = self._at
        self._words[self._first] = at.word(at.index)
        self._words[self._first + _SPACING] = at.word(at.digest)


class Patience:
    """How a rank waits for another that computes the same: it looks again at once a few times, then sleeps, longer the
    longer it has waited. So a short wait costs little time and a long one little CPU."""

    LOOKS: Final = 20
    """Without sleep, giving way to other threads: some 10 µs."""
    SHORTEST_S: Final = 20e-6
    LONGEST_S: Final = 1e-3
    SHARE: Final = 1 / 8
    """Of the time waited so far, for the next sleep."""

    def __init__(
        self,
        *,
        timeout_s: float,
        check: Callable[[], None],
        clock: Callable[[], float],
        give_way: Callable[[], None],
        sleep: Callable[[float], None],
        too_late: Callable[[], Exception],
    ) -> None:
        """``check`` raises when the other is known to be gone; ``too_late`` makes the error after ``timeout_s``."""
        self._timeout_s = timeout_s
        self._check = check
        self._clock = clock
        self._give_way = give_way
        self._sleep = sleep
        self._too_late = too_late
        self._began_at = 0.0

    def __call__(self, tries: int) -> None:
        """A ``Wait``. Raises what ``check`` raises, or ``too_late()``."""
        if tries < self.LOOKS:
            if tries == 0:
                self._began_at = self._clock()
            self._give_way()
            return
        self._check()
        waited_s = self._clock() - self._began_at
        if waited_s > self._timeout_s:
            raise self._too_late()
        self._sleep(min(self.LONGEST_S, max(self.SHORTEST_S, waited_s * self.SHARE)))
