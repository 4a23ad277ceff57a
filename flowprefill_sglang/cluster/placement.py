"""Which cores the processes of a measurement run on (Linux), and what they have used."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil

from flowprefill_sglang.errors import StartupError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What to restore."""

    own_cores: frozenset[int]

    def undo(self) -> None:
        """This process may use its former cores again; the others are expected to be gone."""
        os.sched_setaffinity(0, self.own_cores)


def scheduler_of(server_pid: int) -> int:
    """The process below an SGLang server that runs its scheduler. Raises StartupError when there is none."""
    for process in psutil.Process(server_pid).children(recursive=True):
        if "".join(process.cmdline()).startswith("sglang::scheduler"):
            return process.pid
    raise StartupError(f"the SGLang server with process id {server_pid} has no scheduler process")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used since its start, all threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def set_schedulers_apart(children: Sequence[int], schedulers: Collection[int]) -> Placement | None:
    """The scheduler processes on the first core, everything else on the others, this process included.

    ``children`` are processes with all below them. None where there is one core, or no way to choose. Every thread that
    exists is moved; those that come later inherit from the one that starts them.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    own_cores = os.sched_getaffinity(0)
    first, *others = sorted(own_cores)
    if not others:
        return None
    parents = [psutil.Process(pid) for pid in children]
    below = [process for parent in parents for process in parent.children(recursive=True)]
    for process in (*parents, *below, psutil.Process()):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {first} if process.pid in schedulers else set(others))
    return Placement(own_cores=frozenset(own_cores))
