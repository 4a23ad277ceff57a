"""Which tasks to start over so that memory admits a request that can be on time.

A suspended task keeps its memory. One that was given up, i.e. that will be late as things stand, may keep it for long,
since everything on time goes before it; and where such tasks hold what an urgent request needs, that would have to wait
for one of them to end. So they are *retracted*: what they have computed is thrown away, their memory is free at once,
and their requests wait again. That costs device time in which nothing on time was to run, and no promise, since those
were broken already. SGLang does the same to decoding requests when memory runs out.

Not retracted are promoted tasks (``core.aging`` owes them progress, so nobody is started over for ever), and those of
which something has left this worker: a prompt after its first chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.prefill_worker.admission import Holding, Room
from flowprefill_sglang.prefill_worker.scheduler import Task


@dataclass(frozen=True, slots=True)
class Outlook:
    """What becomes of the candidates of a ranking if they run in its order and nobody else comes."""

    on_time: frozenset[Candidate]
    """Of those with a deadline."""
    given_up: Sequence[Candidate]
    """Begun, not promoted, and late or without a deadline; the last of the ranking first."""

    @classmethod
    def of(cls, order: Sequence[Candidate], now: float) -> Outlook:
        """Of a ranking, best first."""
        on_time, given_up, ends_at = [], [], now
        for candidate in order:
            ends_at += candidate.remaining_s
            if ends_at <= candidate.deadline_at < inf:
                on_time.append(candidate)
            elif candidate.standing in (Standing.SUSPENDED, Standing.RUNNING) and not candidate.is_promoted:
                given_up.append(candidate)
        return cls(frozenset(on_time), given_up[::-1])


def tasks_to_retract(
    tasks: Iterable[Task], room: Room, *, holding: Callable[[Task], Holding], fits: Callable[[Room], bool]
) -> list[Task]:
    """The first few of ``tasks`` that together give back enough, without those that turn out not to be needed for it;
    none when not even all of them do. ``holding``: what a task gives back. ``fits``: whether a room is enough."""
    chosen: list[Task] = []
    for task in tasks:
        chosen.append(task)
        room = room.without(holding(task))
        if fits(room):
            break
    else:
        return []
    for task in chosen[:-1]:
        smaller = room.plus(holding(task))
        if fits(smaller):
            chosen.remove(task)
            room = smaller
    return chosen
