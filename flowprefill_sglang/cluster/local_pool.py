"""Members as child processes of this machine.

Everything but their end happens on the launcher's main thread, which must be the one that starts them: the kernel ends
them with it, whatever happens to the launcher.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Final

from flowprefill_sglang.cluster.gpus import Gpus
from flowprefill_sglang.cluster.member_process import MemberProcess, end_members
from flowprefill_sglang.cluster.members import Order, Sight
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.cluster.process_group import available_bytes, memory_bytes
from flowprefill_sglang.errors import FlowPrefillError, PeerFault, StartupError

ADDRESS: Final = "127.0.0.1"
"""Where members listen: nobody outside of this machine needs them."""
_END_GRACES_S: Final = (8.0, 3.0)
"""After the first interrupt SGLang ends its children one after another."""
_PORTS_EACH: Final = 2
_GIB: Final = 2**30


class LocalHost:
    """Members on this machine."""

    shares_files = True

    def __init__(self, gpus: Sequence[str] = (), gpus_each: Mapping[str, int] | None = None) -> None:
        """``gpus``: to divide among members, as ``CUDA_VISIBLE_DEVICES`` has them. ``gpus_each``: how many a member of
        each kind takes; one that takes none is left to see what this process sees."""
        self._gpus = Gpus(gpus)
        self._gpus_each = gpus_each or {}
        self._waiting: dict[str, Order] = {}
        """Members that are to be started when there are GPUs for them."""
        self._processes: dict[str, MemberProcess] = {}
        self._not_started: dict[str, str] = {}
        """Why there is no process of a member that was to be started."""
        self._in_a_hurry = False

    def require_room(self, counts: Mapping[str, int]) -> None:
        """Raise StartupError without GPUs or free ports for so many, or without memory for as many more as there are to
        be, going by what those that run take."""
        self._gpus.require_room(counts, self._gpus_each)
        more = {kind: number - len(self._pids(kind)) for kind, number in counts.items()}
        free_ports(_PORTS_EACH * sum(max(0, number) for number in more.values()))
        each = {kind: max(map(memory_bytes, self._pids(kind)), default=0) for kind in counts}
        available = available_bytes()
        if sum(max(0, more[kind]) * each[kind] for kind in counts) > available:
            asked = " and ".join(
                f"{more[kind]} more {kind} × {each[kind] / _GIB:.1f} GiB" for kind in counts if more[kind] > 0
            )
            raise StartupError(f"this machine has no room for {asked}: {available / _GIB:.1f} GiB of memory are left")

    def _pids(self, kind: str) -> list[int]:
        return [process.child.pid for name, process in self._processes.items() if name.startswith(f"{kind}-")]

    def start(self, order: Order) -> None:
        """Start its process as soon as there are GPUs for it, or note why it cannot be started."""
        self._waiting[order.name] = order
        self._start_waiting()

    def _start_waiting(self) -> None:
        # All that are wanted have room at once (require_room), so what one lacks is held by members that are to end.
        # Another that needs less may go first: that keeps nobody out for ever.
        for name, order in list(self._waiting.items()):
            gpus = self._gpus.take(name, self._gpus_each.get(order.kind, 0))
            if gpus is not None:
                del self._waiting[name]
                self._start(order, gpus)

    def _start(self, order: Order, gpus: Sequence[str]) -> None:
        taken = {port for process in self._processes.values() for port in process.ports}
        try:
            self._processes[order.name] = MemberProcess(
                order, ADDRESS, _threads(order), taken | set(order.taken_ports), gpus
            )
        except (FlowPrefillError, OSError) as error:
            self._not_started[order.name] = f"cannot start: {error}"

    async def look(self, name: str) -> Sight:
        """What is known of it, at once."""
        if name in self._waiting:
            return Sight(waiting_for="GPUs of members that are to end")
        process = self._processes.get(name)
        if process is None:
            reason = self._not_started.get(name)
            return Sight(waiting_for="its turn") if reason is None else Sight(ended=reason)
        ended, wrong_use = process.ended() or (None, False)
        child = process.child
        return Sight(
            url=process.url,
            pid=child.pid,
            gpus=process.gpus,
            ended=ended,
            wrong_use=wrong_use,
            log=str(child.log),
        )

    async def ask_to_end(self, name: str) -> None:
        """SIGTERM."""
        process = self._processes.get(name)
        if process is not None:
            process.child.terminate()

    async def remove(self, name: str) -> None:
        """End it now, and give its GPUs to whoever waits for them."""
        self._waiting.pop(name, None)
        self._not_started.pop(name, None)
        process = self._processes.pop(name, None)
        if process is not None:
            await asyncio.to_thread(end_members, [process], ())
        self._gpus.release(name)
        self._start_waiting()

    async def log(self, name: str, lines: int) -> str:
        """The end of its log. Raises PeerFault."""
        process = self._processes.get(name)
        if process is None:
            raise PeerFault(f"{name} has no log now: no process of it runs", status=503)
        try:
            return await asyncio.to_thread(process.child.log_tail, lines)
        except OSError as error:
            raise PeerFault(f"the log of {name} cannot be had: {error}") from error

    async def end_all(self) -> None:
        """All at once."""
        processes = list(self._processes.values())
        self._waiting.clear()
        self._processes.clear()
        await asyncio.to_thread(end_members, processes, _END_GRACES_S, lambda: self._in_a_hurry)

    def hurry(self) -> None:
        """Do without the first grace of an ``end_all`` that is under way, or to come."""
        self._in_a_hurry = True


def _threads(order: Order) -> int | None:
    """The cores divided among the servers, unless somebody has said otherwise. GPUs do not ask."""
    if order.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return order.threads
    return max(1, (os.cpu_count() or 1) // order.servers)
