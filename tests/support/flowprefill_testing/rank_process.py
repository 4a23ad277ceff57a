"""One rank of a small tensor-parallel group in processes of their own: real shared memory, sockets and gloo, and a
forward pass of two matrices that all ranks share, in place of a model.

Each rank is late at random boundaries. The leader stops the running task at random ones and says which runs next.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flowprefill_sglang.integration.prefill.tensor_parallel import Group
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.rank_meeting import follow, lead
from flowprefill_sglang.prefill_worker.ranks import Alone
from flowprefill_sglang.prefill_worker.task import ForwardTask

WIDTH, ROWS = 16, 4


@dataclass(frozen=True)
class Work:
    """What the group is put through."""

    tasks: int
    operators: int
    """Of each task."""
    event_chance: float
    """At each of the leader's boundaries."""
    late_chance: float = 0.02
    """At each boundary of each rank."""
    late_s: float = 1e-3
    """At most."""
    victim: int | None = None
    """This rank kills itself, at its boundary number ``dies_at``."""
    dies_at: int = 0


@dataclass
class Ended:
    """What a rank left behind."""

    outputs: list[list[float]] = field(default_factory=list)
    """Of each task: what its forward pass computed."""
    stops: list[tuple[int, int]] = field(default_factory=list)
    """Task, and its operators so far, at each stop."""
    error: str = ""


class NoState:
    """Nothing is shared between these forward passes."""

    def save(self) -> None: ...

    def restore(self, saved: object) -> None: ...

    def may_stop(self) -> bool:
        return True

    def check(self) -> None: ...


def run_group(count: int, work: Work, folder: Path, within_s: float) -> tuple[list[Ended], list[int | None]]:
    """Run a group to its end: what each rank left behind, and its exit status (None: it was still running)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all
    processes = [context.Process(target=_rank, args=(rank, count, work, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    left = [folder / f"{rank}.json" for rank in range(count)]
    return [Ended(**json.loads(file.read_text())) if file.exists() else Ended() for file in left], codes


def run_alone(work: Work) -> list[list[float]]:
    """The same forward passes by one rank, uninterrupted."""
    forward = _Forward(Group(Alone(), None), 0, 1, Gate(), work, random.Random(0))
    return [forward.whole(task) for task in range(work.tasks)]


def _rank(rank: int, count: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    ended = Ended()
    try:
        _serve(_join(rank, count), rank, count, work, ended)
    except Exception as error:
        ended.error = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(vars(ended)))
    os._exit(1 if ended.error else 0)  # gloo waits for connections that a killed rank has left half open


def _join(rank: int, count: int) -> Group:
    def leaders(path: str | None) -> str | None:
        paths = [path]
        dist.broadcast_object_list(paths, src=0)
        return paths[0]

    return Group(*(lead(count, leaders) if rank == 0 else follow(rank, count, leaders(None))))


def _serve(group: Group, rank: int, count: int, work: Work, ended: Ended) -> None:
    ranks, gate, rng = group.ranks, Gate(lease=group.lease), random.Random(rank)
    forward = _Forward(group, rank, count, gate, work, rng)
    tasks = [ForwardTask(partial(forward.whole, task), gate, NoState()) for task in range(work.tasks)]
    gate.watch(lambda: rng.random() < work.event_chance)
    ranks.listen(lambda rank, news: None, lambda: None)
    with group.blaming_the_dead():
        while going_on := [number for number, task in enumerate(tasks) if not task.is_over]:
            number = ranks.agree("task", rng.choice(going_on))
            ranks.confirm("state", (number, forward.done[number], tasks[number].suspensions))
            if not tasks[number].advance():
                ended.stops.append((number, forward.done[number]))
    ended.outputs = [task.result for task in tasks]
    ranks.close()


class _Forward:
    """Two operators a layer, of which the second ends in a collective."""

    def __init__(self, group: Group, rank: int, count: int, gate: Gate, work: Work, rng: random.Random) -> None:
        everything = torch.Generator().manual_seed(7)
        first, second = (torch.randn(WIDTH, WIDTH, generator=everything, dtype=torch.float64) / 8 for _ in range(2))
        self._first, self._second = first.chunk(count, dim=1)[rank], second.chunk(count, dim=0)[rank]
        self._group, self._rank, self._gate, self._work, self._rng = group, rank, gate, work, rng
        self._boundaries = 0
        self.done = [0] * work.tasks

    def whole(self, task: int) -> list[float]:
        made: Any = torch.Generator().manual_seed(task)
        x = torch.randn(ROWS, WIDTH, generator=made, dtype=torch.float64)
        for operator in range(0, self._work.operators, 2):
            self._boundary(task, operator)
            hidden = torch.tanh(x @ self._first)
            self._boundary(task, operator + 1)
            part = hidden @ self._second
            if self._group.ranks.count > 1:
                dist.all_reduce(part)
            x = 0.5 * x + part + 0.01 * operator
        return [float(value) for value in x.flatten()]

    def _boundary(self, task: int, operator: int) -> None:
        self._boundaries += 1
        if self._work.victim == self._rank and self._boundaries == self._work.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._rng.random() < self._work.late_chance:
            time.sleep(self._rng.random() * self._work.late_s)
        self.done[task] = operator
        self._gate.cross(kind=operator % 2)
