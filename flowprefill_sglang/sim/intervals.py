"""Jobs with windows, and the room in every interval from a release to a deadline.

A set of jobs can be done in time on W preemptive machines that may share a job if and only if what must be done within
each such interval fits it: ``Σ { p_j : s ≤ r_j, d_j ≤ t }  ≤  W · (t − s)``. For one machine that is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

ROUNDING_S: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, as the bound sees it."""

    released_at: float
    deadline_at: float
    work_s: float
    """Device time that serving it takes at least, positive."""
    alone_s: float
    """Its window must be at least so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What the greedy gave, and which intervals stopped it."""

    value: float
    """Jobs, parts of them counted as such."""
    taken: NDArray[np.float64]
    """Of each job, in [0, 1]."""
    tight: list[tuple[int, int]]
    """Intervals with no room left that a job did not fit, as indices of a release and a deadline."""


class Intervals:
    """The possible ones of some jobs, with all intervals. O(n²) memory."""

    def __init__(self, jobs: Iterable[Job], workers: int = 1) -> None:
        numbered = [
            (number, job)
            for number, job in enumerate(jobs)
            if job.deadline_at - job.released_at >= job.alone_s - ROUNDING_S
        ]
        self.numbers = [number for number, _ in numbered]
        """Which of the jobs given each of ours is."""
        possible = [job for _, job in numbered]
        self.work_s = np.array([job.work_s for job in possible], dtype=np.float64)
        self.releases, self.release_of = np.unique([job.released_at for job in possible], return_inverse=True)
        self.deadlines, self.deadline_of = np.unique([job.deadline_at for job in possible], return_inverse=True)
        self.room_s = workers * (self.deadlines[np.newaxis, :] - self.releases[:, np.newaxis])
        """In the interval from release i to deadline k. Those that hold no job are in it and never looked at."""

    def __len__(self) -> int:
        return len(self.work_s)

    def fill(self, order: Sequence[int], *, is_whole: bool) -> Filled:
        """Give the jobs, in this order, as much as the tightest interval around each has room for; or, if it is to be
        whole, all or nothing."""
        room_s, taken = self.room_s.copy(), np.zeros(len(self))
        tight: dict[tuple[int, int], None] = {}
        for job in order:
            work_s, last = float(self.work_s[job]), int(self.release_of[job])
            first = int(self.deadline_of[job])
            around = room_s[: last + 1, first:]  # every interval that holds the job's window
            least_s = float(around.min())
            given_s = min(work_s, least_s)
            if given_s < work_s - ROUNDING_S:
                release, deadline = np.unravel_index(int(around.argmin()), around.shape)
                tight[int(release), first + int(deadline)] = None
                if is_whole:
                    continue
            if given_s > 0:
                around -= given_s
                taken[job] = given_s / work_s
        if is_whole:
            taken = np.ceil(taken - ROUNDING_S)
        return Filled(value=float(taken.sum()), taken=taken, tight=list(tight))

    def shortest_first(self) -> list[int]:
        """Jobs by what they take."""
        return [int(job) for job in np.argsort(self.work_s, kind="stable")]

    def excess_s(self, taken: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much each interval is asked for more than it has; 0 where it is not."""
        asked_s = np.zeros_like(self.room_s)
        np.add.at(asked_s, (self.release_of, self.deadline_of), self.work_s * taken)
        asked_s = np.cumsum(np.cumsum(asked_s[::-1], axis=0)[::-1], axis=1)
        excess: NDArray[np.float64] = np.where(self.room_s > 0, np.maximum(0.0, asked_s - self.room_s), 0.0)
        return excess

    def inside(self, interval: tuple[int, int]) -> NDArray[np.intp]:
        """The jobs whose windows it holds."""
        return np.nonzero((self.release_of >= interval[0]) & (self.deadline_of <= interval[1]))[0]
