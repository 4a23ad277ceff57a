"""Undoing tasks that were given up, where what they hold keeps another request from being on time
(``prefill_worker.retraction``): SGLang's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.utils import is_aborted

from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.integration.prefill.batches import Begun, PrefillBatches
from flowprefill_sglang.integration.prefill.request_terms import update_extent
from flowprefill_sglang.prefill_worker.admission import Room
from flowprefill_sglang.prefill_worker.retraction import Outlook, tasks_to_retract
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Task

if TYPE_CHECKING:
    from flowprefill_sglang.integration.prefill.memory import PrefillMemory


class Retraction:
    """Chooses tasks and undoes them. Used by the loop, on the scheduler's thread."""

    def __init__(self, core: PrefillScheduler, memory: PrefillMemory, batches: PrefillBatches) -> None:
        self._core, self._memory, self._batches = core, memory, batches

    def choose(self, outlook: Outlook, candidate: Candidate, room: Room, begun: Mapping[Task, Begun]) -> list[Task]:
        """The tasks without which memory admits a request; none where it is for something else that it cannot start,
        where all of them are not enough, and for a request that is late either way, which is not worth what they have
        computed."""
        head = self._core.request_of(candidate)
        is_begun = candidate.standing is Standing.HALF_PREFILLED
        if candidate not in outlook.on_time or self._memory.refusal(room, head, is_begun=is_begun) is None:
            return []
        slots = self._memory.kv_slots(head.new_tokens + head.cached_tokens)

        def fits(room: Room) -> bool:
            # Where nothing would be under way any more, admission leaves it to SGLang; tasks are not undone on a guess.
            return self._memory.refusal(room, head, is_begun=is_begun) is None and (is_begun or room.has_kv(slots))

        tasks = [task for one in outlook.given_up if (task := self._core.task_of(one)) is not None]
        return tasks_to_retract(
            [task for task in tasks if task.is_first and all(map(_is_undoable, begun[task].batch.reqs))],
            room,
            holding=self._memory.holding,
            fits=fits,
        )

    def undo(self, task: Task, begun: Begun) -> None:
        """A suspended task is no more: its memory is free, and its requests wait."""
        begun.forward.discard()
        self._batches.requeue(begun.batch.reqs)
        for request, req in zip(task.requests, begun.batch.reqs, strict=True):
            update_extent(request, req)
        self._core.retracted(task)


def _is_undoable(req: Any) -> bool:
    return not is_aborted(req) and PrefillBatches.is_unsent(req)
