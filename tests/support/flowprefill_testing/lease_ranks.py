"""A tensor-parallel group on one thread: ranks are greenlets, and a random source says who takes the next step, when a
word that one rank wrote becomes visible to another, and when something happens.

A step ends at every access to the shared memory, in front of every operator and wherever a rank waits. Words become
visible late, and two words of one writer in any order: more than any machine does that the lease is made for. Operators
meet as collectives do, so ranks that are in different ones wait for ever, which is found out: nobody can take a step.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from greenlet import getcurrent, greenlet

from flowprefill_sglang.prefill_worker.lease import FollowerLease, LeaderLease, Lease, words_for

MAX_IDLE_STEPS = 20_000
"""In a row, without any rank running an operator or a decision: nobody ever will again."""


@dataclass(frozen=True)
class Plan:
    """What a group is put through."""

    seed: int
    ranks: int
    lookahead: int
    tasks: Sequence[int]
    """Boundaries of each, one after the other."""
    collective_every: int
    """Every so many operators, one is a collective."""
    event_chance: float
    """At each of the leader's boundaries but the first of a stretch, where it is lower."""
    unstoppable_chance: float = 0.0
    """Share of the boundaries at which no rank can stop."""
    laziness: Sequence[float] = ()
    """Weights of the ranks when the next to step is drawn."""


@dataclass
class Outcome:
    """What happened."""

    stops: list[list[tuple[int, int, int]]]
    """For each rank: task, its operators so far, and boundaries of the stretch, at each stop."""
    operators: list[list[tuple[int, int]]]
    """For each rank: task and number of each operator, in the order it ran them."""
    overruns: list[str] = field(default_factory=list)
    """Operators that a follower ran before the leader had granted or passed them."""
    latest_stop: int = 0
    """Boundaries that the leader passed, at most, between an event and the stop for it."""


class Stuck(AssertionError):
    """Nobody can go on."""


class Group:
    """Runs one plan."""

    def __init__(self, plan: Plan, lease_of: LeaseOf | None = None) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._memory = DelayedWords(plan.ranks, words_for(plan.ranks - 1), self._rng, self._step)
        make = lease_of or self._lease
        self._leases = [make(rank, self._memory, self._wait) for rank in range(plan.ranks)]
        self._main = getcurrent()
        self._decisions: list[int | None] = []  # the task that each stretch runs, None at the end
        self._arrived: dict[tuple[int, int], int] = {}
        self._leaders_last = (0, 0)
        self._idle_steps = 0
        self.outcome = Outcome([[] for _ in range(plan.ranks)], [[] for _ in range(plan.ranks)])
        cannot = random.Random(plan.seed + 1)
        self._unstoppable = {
            (task, operator)
            for task, length in enumerate(plan.tasks)
            for operator in range(1, length + 1)
            if cannot.random() < plan.unstoppable_chance
        }

    def run(self) -> Outcome:
        """Until every rank has ended every task. Raises Stuck when that can never be."""
        ranks = [greenlet(self._rank) for _ in range(self._plan.ranks)]
        weights = list(self._plan.laziness) or [1.0] * len(ranks)
        while not all(rank.dead for rank in ranks):
            alive = [number for number, rank in enumerate(ranks) if not rank.dead]
            chosen = self._rng.choices(alive, [weights[number] for number in alive])[0]
            self._memory.reader = chosen
            self._idle_steps += 1
            if self._idle_steps > MAX_IDLE_STEPS:
                raise Stuck(f"{[operators[-1:] for operators in self.outcome.operators]} {self.outcome.stops}")
            ranks[chosen].switch(chosen)
        return self.outcome

    # ---- a rank -----------------------------------------------------------------------------------------------

    def _rank(self, me: int) -> None:
        lease, done, stretch = self._leases[me], [0] * len(self._plan.tasks), 0
        while (task := self._decided(me, stretch, done)) is not None:
            self._stretch(me, lease, task, done)
            stretch += 1

    def _decided(self, me: int, stretch: int, done: list[int]) -> int | None:
        """The leader's choice among the tasks that have not ended."""
        if me == 0:
            open_tasks = [task for task, length in enumerate(self._plan.tasks) if done[task] < length]
            self._decisions.append(self._rng.choice(open_tasks) if open_tasks else None)
        while len(self._decisions) <= stretch:
            self._step()
        self._idle_steps = 0
        return self._decisions[stretch]

    def _stretch(self, me: int, lease: Lease, task: int, done: list[int]) -> None:
        lease.begin()
        length, boundaries, event_at = self._plan.tasks[task], 0, None
        while done[task] < length:
            operator = done[task] + 1
            boundaries += 1
            if me == 0 and event_at is None and self._happens(boundaries):
                event_at = boundaries
            if lease.cross(event_at is not None, kind=operator % 5):
                if (task, operator) not in self._unstoppable:
                    self.outcome.stops[me].append((task, done[task], boundaries))
                    if event_at is not None and not self._plan.unstoppable_chance:
                        self.outcome.latest_stop = max(self.outcome.latest_stop, boundaries - event_at)
                    break
                lease.cannot_stop()
            self._operator(me, task, operator)
            done[task] = operator
        lease.end()

    def _happens(self, boundaries: int) -> bool:
        # Less often at the first boundary, or nothing would ever be computed.
        return self._rng.random() < self._plan.event_chance * (0.3 if boundaries == 1 else 1.0)

    def _operator(self, me: int, task: int, operator: int) -> None:
        self._step()
        self._idle_steps = 0
        self.outcome.operators[me].append((task, operator))
        ahead = len(self.outcome.operators[me]) - len(self.outcome.operators[0])
        if ahead > self._plan.lookahead + 1:
            self.outcome.overruns.append(f"rank {me} is {ahead} operators ahead of the leader at {task, operator}")
        if operator % self._plan.collective_every == 0:
            self._meet(me, task, operator)

    def _meet(self, me: int, task: int, operator: int) -> None:
        place = task, operator
        self._arrived[place] = self._arrived.get(place, 0) + 1
        while self._arrived[place] < self._plan.ranks:
            self._step()

    # ---- steps ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._main.switch()

    def _wait(self, tries: int) -> None:
        self._step()

    def _lease(self, rank: int, memory: DelayedWords, wait: Callable[[int], None]) -> Lease:
        if rank == 0:
            return LeaderLease(memory, self._plan.ranks - 1, wait, self._plan.lookahead)
        return FollowerLease(memory, rank, wait)


class DelayedWords:
    """Shared memory as each rank sees it."""

    def __init__(self, ranks: int, size: int, rng: random.Random, step: Callable[[], None]) -> None:
        self.reader = 0
        """Who takes a step now."""
        self._views = [[0] * size for _ in range(ranks)]
        self._coming: list[dict[int, deque[int]]] = [{} for _ in range(ranks)]
        self._writers: dict[int, int] = {}
        self._rng = rng
        self._step = step

    def __getitem__(self, index: int) -> int:
        self._step()
        coming = self._coming[self.reader].get(index)
        while coming and self._rng.random() < 0.5:
            self._views[self.reader][index] = coming.popleft()
        return self._views[self.reader][index]

    def __setitem__(self, index: int, value: int) -> None:
        self._step()
        assert 0 <= value < 1 << 64
        assert self._writers.setdefault(index, self.reader) == self.reader, f"word {index} has two writers"
        self._views[self.reader][index] = value
        for rank, coming in enumerate(self._coming):
            if rank != self.reader:
                coming.setdefault(index, deque()).append(value)


LeaseOf = Callable[[int, DelayedWords, Callable[[int], None]], Lease]
"""Makes a rank's end of a lease, from its rank, the memory and how it waits."""
