"""How many whole jobs anyone could have in time: the linear program's bound without parts of jobs.

Nobody can serve a part of a request, and the linear program counts one wherever an interval is full. The integer
program, ``x ∈ {0, 1}`` over the same intervals, is solved by cutting planes: begin with the intervals that stopped the
linear program's greedy, solve, add those that the solution violates, and so on. Any of these programs has fewer
constraints than the whole, so what its branch and bound has proved, be it cut short or not, is a bound of the whole.

Its solutions, mended, are schedules too. So there are two figures, and the best lies between them. They meet when a
solution violates nothing, and then both are the best: for one machine the intervals are exact.

HiGHS does the branch and bound, through SciPy (which SGLang needs anyway). Without SciPy the bound is the linear
program's, rounded down.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flowprefill_sglang.sim.intervals import Intervals

try:
    from scipy import optimize, sparse
except ImportError:  # it comes with SGLang, which need not be here
    optimize = None

MOST_NEW_CUTS: Final = 40
"""In one round: a few hundred intervals say it all, and every row makes the program slower."""
_INTEGER: Final = 1e-6
_CLOSE: Final = 0.5
"""Jobs. The linear program over some intervals that comes so near to that over all is good enough to begin with."""
_VIOLATED_S: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """Around the most jobs that can be in time."""

    chosen: frozenset[int] = field(repr=False)
    """Of the jobs that ``Intervals`` was given, a set that can, on one machine."""
    most: int
    """No more can."""

    @property
    def least(self) -> int:
        """So many can on one machine."""
        return len(self.chosen)


def bracket(intervals: Intervals, seconds: float) -> Bracket:
    """Both figures, in about so many seconds of computing; 0 takes what the greedy says. What is not proved by then
    leaves them apart, so they depend on how fast the machine is."""
    if not len(intervals):
        return Bracket(chosen=frozenset(), most=0)
    order = intervals.shortest_first()
    linear, chosen = intervals.fill(order, is_whole=False), intervals.fill(order, is_whole=True)
    most = math.floor(linear.value + _INTEGER)
    if optimize is not None:
        program = _Program(intervals, linear.tight)
        end_at = time.monotonic() + seconds
        is_whole = False  # at first, until the program has what makes the linear one as tight as it gets
        while chosen.value < most and (left_s := end_at - time.monotonic()) > 0:
            solved = program.solve(left_s, is_whole=is_whole)
            if solved is None:
                break
            most = min(most, solved.most)
            is_new = program.add(_violated(intervals, solved.taken))
            if not is_whole:
                is_whole = not is_new or solved.value < linear.value + _CLOSE
                continue
            its_first = [order[place] for place in np.argsort(-solved.taken[order], kind="stable")]
            mended = intervals.fill(its_first, is_whole=True)
            chosen = max(chosen, mended, key=lambda one: one.value)
            if not is_new:
                break
    numbers = (intervals.numbers[job] for job in np.nonzero(chosen.taken)[0])
    return Bracket(chosen=frozenset(numbers), most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solved:
    value: float
    """Of the solution."""
    most: int
    """What no solution passes."""
    taken: NDArray[np.float64]


class _Program:
    """The program over some of the intervals, each with at least one job."""

    def __init__(self, intervals: Intervals, cuts: list[tuple[int, int]]) -> None:
        self._intervals = intervals
        self._cuts: dict[tuple[int, int], NDArray[np.intp]] = {}
        self.add(cuts)

    def add(self, cuts: list[tuple[int, int]]) -> bool:
        """Whether any of them is new."""
        new = [cut for cut in cuts if cut not in self._cuts]
        self._cuts.update((cut, self._intervals.inside(cut)) for cut in new)
        return bool(new)

    def solve(self, seconds: float, *, is_whole: bool) -> _Solved | None:
        """The linear program, or one run of branch and bound; None when there was no time for any solution."""
        work_s, jobs = self._intervals.work_s, len(self._intervals)
        members = list(self._cuts.values())
        rows = np.repeat(np.arange(len(members)), [len(one) for one in members])
        columns = np.concatenate(members)
        matrix = sparse.csr_matrix((work_s[columns], (rows, columns)), shape=(len(members), jobs))
        room_s = np.array([self._intervals.room_s[cut] for cut in self._cuts])
        with _stdout_discarded():
            found: Any = optimize.milp(  # SciPy has no types
                -np.ones(jobs),
                integrality=np.full(jobs, int(is_whole)),
                bounds=optimize.Bounds(0, 1),
                constraints=optimize.LinearConstraint(matrix, -np.inf, room_s),
                options={"time_limit": seconds},
            )
        if found.x is None:
            return None
        if not is_whole:
            return _Solved(value=-found.fun, most=jobs, taken=found.x)
        most = math.floor(_INTEGER - found.mip_dual_bound) if math.isfinite(found.mip_dual_bound) else jobs
        return _Solved(value=-found.fun, most=most, taken=np.round(found.x))


@contextmanager
def _stdout_discarded() -> Iterator[None]:
    """HiGHS as SciPy 1.17 has it writes a line there now and then, whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _violated(intervals: Intervals, taken: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The most violated intervals, no two of which nearly coincide."""
    excess_s = intervals.excess_s(taken)
    excess_s[excess_s < _VIOLATED_S] = 0.0
    found: list[tuple[int, int]] = []
    while len(found) < MOST_NEW_CUTS:
        release, deadline = (int(index) for index in np.unravel_index(int(excess_s.argmax()), excess_s.shape))
        if excess_s[release, deadline] == 0:
            break
        found.append((release, deadline))
        start_at, end_at = intervals.releases[release], intervals.deadlines[deadline]
        near_s = (end_at - start_at) / 4
        near_releases = slice(*np.searchsorted(intervals.releases, (start_at - near_s, start_at + near_s)))
        near_deadlines = slice(*np.searchsorted(intervals.deadlines, (end_at - near_s, end_at + near_s)))
        excess_s[near_releases, near_deadlines] = 0.0
    return found
