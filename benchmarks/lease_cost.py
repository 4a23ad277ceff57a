"""What the lease of a tensor-parallel worker costs at a boundary: ``boundary_cost.py --tp N`` runs this.

Ranks are processes on this machine, with the worker's own lease, shared memory, sockets, gate and tasks. In place of a
model each computes its share of a decoder's layers of the deep tiny model's size, which gloo puts together: five
operators a layer and two collectives. In turns:

* ``free``: tasks whose gate has no lease: ranks meet in the collectives only;
* ``leased``: the same tasks under the lease, which the leader grants at each boundary and the follower waits for.

``bare`` tasks are nothing but boundaries. The leader waits for nobody in them, so what they take is its own work.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention, silu

from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.integration.prefill.tensor_parallel import Group
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.rank_meeting import follow, lead
from flowprefill_sglang.prefill_worker.task import ForwardTask

KINDS = ("free", "leased")
LAYERS, WIDTH, INNER, HEADS = 8, 64, 128, 4
BARE, BARE_BOUNDARIES = 0, 2_000
"""Stands for a length of prompt: none."""
WARM_UP = 5
ENDING_S = 30.0


def measure_lease(ranks: int, lengths: Sequence[int], repeats: Callable[[int], int], seed: int) -> list[dict[str, Any]]:
    """A row for each turn: milliseconds by kind on the leader, and the boundaries of a task.

    ``repeats``: turns of a length. Raises ValueError for a number of ranks that cannot share the layers, RuntimeError
    when a rank fails.
    """
    if ranks < 2 or HEADS % ranks:
        raise ValueError(f"--tp must be one of 2 and {HEADS}, or 1 for a model without ranks: {ranks}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    turns = [(tokens, repeats(tokens)) for tokens in (BARE, *lengths)]
    with tempfile.TemporaryDirectory(prefix="flowprefill-") as folder:
        arguments = (ranks, folder, turns, seed)
        processes = [
            context.Process(target=_rank, args=(rank, *arguments, None if rank else sender)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        sender.close()  # so that a leader that dies is noticed
        try:
            rows: list[dict[str, Any]] = receiver.recv()
            for process in processes:
                process.join(ENDING_S)
        except EOFError:
            raise RuntimeError("a rank has failed; what it said is above") from None
        finally:
            for process in processes:
                process.kill()
    return rows


def summarize_lease(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians for each length, and what the lease adds at a boundary."""
    summaries = []
    for tokens in sorted({row["tokens"] for row in rows}):
        turns = [row for row in rows if row["tokens"] == tokens]
        count = turns[0]["boundaries"]
        more_ms = percentile([row["leased_ms"] - row["free_ms"] for row in turns], 50)
        summary: dict[str, Any] = {"tokens": tokens or "bare", "turns": len(turns), "boundaries": count}
        summary |= {f"{kind}_ms": round(percentile([row[f"{kind}_ms"] for row in turns], 50), 4) for kind in KINDS}
        summaries.append(summary | {"lease_us_per_boundary": round(1_000 * more_ms / count, 3)})
    return summaries


def _rank(
    rank: int, count: int, folder: str, turns: Sequence[tuple[int, int]], seed: int, rows: Connection | None
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    group = _meet(rank, count)
    with group.blaming_the_dead():
        found = _Turns(group, rank, seed).run(turns)
        dist.barrier()  # nobody hangs up before all are done
    if rows is not None:
        rows.send(found)
    group.ranks.close()
    dist.destroy_process_group()


def _meet(rank: int, count: int) -> Group:
    def leaders(path: str | None) -> str | None:
        paths = [path]
        dist.broadcast_object_list(paths, src=0)
        return paths[0]

    return Group(*(lead(count, leaders) if rank == 0 else follow(rank, count, leaders(None))))


class _NoState:
    """Nothing is shared between these tasks."""

    def save(self) -> None: ...

    def restore(self, saved: object) -> None: ...

    def may_stop(self) -> bool:
        return True

    def check(self) -> None: ...


class _Turns:
    """One rank's part in all turns. Ranks draw alike."""

    def __init__(self, group: Group, rank: int, seed: int) -> None:
        self._gates = {"free": Gate(), "leased": Gate(lease=group.lease)}
        self._rng = random.Random(seed)
        made = torch.Generator().manual_seed(seed)
        count = group.ranks.count
        self._heads = HEADS // count

        def share(rows: int, columns: int, dim: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=made) / rows**0.5).chunk(count, dim)[rank].contiguous()

        self._layers = [
            (share(WIDTH, 3 * WIDTH, 1), share(WIDTH, WIDTH, 0), share(WIDTH, INNER, 1), share(INNER, WIDTH, 0))
            for _ in range(LAYERS)
        ]

    def run(self, turns: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        rows = []
        for tokens, repeats in turns:
            x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
            for turn in range(-WARM_UP, repeats):
                row: dict[str, Any] = {"tokens": tokens, "turn": turn}
                for kind in self._rng.sample(KINDS, len(KINDS)):
                    row[f"{kind}_ms"], row["boundaries"] = self._timed(self._gates[kind], x)
                if turn >= 0:
                    rows.append(row)
        return rows

    def _timed(self, gate: Gate, x: torch.Tensor) -> tuple[float, int]:
        run = self._bare if len(x) == BARE else self._forward
        task = ForwardTask(lambda: run(gate, x), gate, _NoState())
        before = gate.boundaries
        dist.barrier()
        began_at = time.perf_counter()
        if not task.advance():
            raise AssertionError("a task was stopped that nobody wanted to stop")
        return round(1_000 * (time.perf_counter() - began_at), 4), gate.boundaries - before

    def _bare(self, gate: Gate, x: torch.Tensor) -> None:
        for _ in range(BARE_BOUNDARIES):
            gate.cross(1)

    def _forward(self, gate: Gate, x: torch.Tensor) -> torch.Tensor:
        for qkv, out, up, down in self._layers:
            gate.cross(1)
            q, k, v = (x @ qkv).view(len(x), 3, self._heads, -1).permute(1, 2, 0, 3)[:, None]
            gate.cross(2)
            seen = scaled_dot_product_attention(q, k, v, is_causal=True)[0].movedim(0, 1).flatten(1)
            gate.cross(1)
            x = x + self._all(seen @ out)
            gate.cross(1)
            inner = silu(x @ up)
            gate.cross(1)
            x = (x + self._all(inner @ down)) / 2
        return x

    def _all(self, part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(part)
        return part
