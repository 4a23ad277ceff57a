"""The group of scheduler processes that SGLang starts for one tensor-parallel worker.

They find each other at start-up, over SGLang's own gloo group. After that we do not use it: its collectives have
time-outs, and a rank may have nothing to do for hours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from flowprefill_sglang.errors import FlowPrefillError, PeerFault
from flowprefill_sglang.prefill_worker.lease import Lease
from flowprefill_sglang.prefill_worker.rank_meeting import follow, lead
from flowprefill_sglang.prefill_worker.ranks import Alone, Ranks

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

T = TypeVar("T")

NOTICE_S: Final = 3.0
"""How much later than a broken collective the end of a rank may be seen. The kernel closes all of its sockets at once;
this is for a busy machine."""


@dataclass(frozen=True)
class Group:
    """This rank's place among those of the worker."""

    ranks: Ranks
    lease: Lease | None
    """None where there is one rank."""
    gloo: Any = None  # torch's ProcessGroup

    def everybody(self, value: T) -> list[T]:
        """Each rank's value, by rank; at start-up only."""
        values = [value] * self.ranks.count
        if self.ranks.count > 1:
            torch.distributed.all_gather_object(values, value, group=self.gloo)
        return values

    def least(self, value: int) -> int:
        """The smallest of the ranks' values; at start-up only."""
        return min(self.everybody(value))

    @contextmanager
    def blaming_the_dead(self) -> Iterator[None]:
        """Errors raised within this block are raised as PeerFault if they come of a rank's end: collectives say only
        that a connection broke."""
        try:
            yield
        except FlowPrefillError:
            raise
        except Exception as error:
            until = time.monotonic() + (NOTICE_S if self.ranks.count > 1 else 0.0)
            while time.monotonic() < until:
                try:
                    self.ranks.check()
                except PeerFault as fault:
                    raise fault from error
                time.sleep(0.01)
            raise


def join(scheduler: Scheduler) -> Group:
    """Meet the other ranks. To be called on all of them. Raises StartupError."""
    if scheduler.tp_size == 1:
        return Group(Alone(), None)
    group = scheduler.tp_group
    count, rank = group.world_size, group.rank_in_group

    def leaders(path: str | None) -> str | None:
        paths = [path]
        torch.distributed.broadcast_object_list(paths, src=group.ranks[0], group=group.cpu_group)
        return paths[0]

    if rank == 0:
        return Group(*lead(count, leaders), group.cpu_group)
    return Group(*follow(rank, count, leaders(None)), group.cpu_group)
