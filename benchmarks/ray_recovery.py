"""Time to recovery of a pool on Ray: from the loss of a process, an actor or a node to ready again.

A Ray cluster of several nodes on this machine, two prefill workers and a decode instance with the tiny model. Two
clients ask one request after another meanwhile; how their requests ended is in each row. Most of a recovery is the
server's own start, so ``noticed_s`` says when the pool knew.

    PYTHONPATH=.:tests/support python benchmarks/ray_recovery.py --json result.json
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from results_file import write_result

from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_testing.ray_pools import RayPool, ray_nodes

TIMEOUT_S = 240.0


def main() -> int:
    """Lose one of each, print a table, write the rows."""
    parser = argparse.ArgumentParser(description="Time to recovery of a pool on Ray.")
    parser.add_argument("--json", type=Path, help="write provenance and raw rows here")
    options = parser.parse_args()
    with ray_nodes(workers=3) as nodes, tempfile.TemporaryDirectory() as folder:
        pool = RayPool(nodes.address, make_tiny_model(), Path(folder), "--prefill", "2")
        try:
            pool.wait_ready(TIMEOUT_S)
            rows = [
                recovery(pool, "process killed", lambda one: os.kill(one["pid"], signal.SIGKILL)),
                recovery(pool, "process stopped", lambda one: os.kill(one["pid"], signal.SIGSTOP)),
                recovery(pool, "scheduler stopped", lambda one: scheduler_of(one["pid"]).suspend()),
                recovery(pool, "actor killed", lambda one: os.kill(parent_of(one["pid"]), signal.SIGKILL)),
                recovery(pool, "node lost", lambda one: lose_node(nodes, one["node"])),
            ]
        finally:
            pool.clear_away()
    print(f"{'loss':<18}{'noticed_s':>10}{'recovered_s':>12}  answers")
    for row in rows:
        print(f"{row['loss']:<18}{row['noticed_s']:>10.1f}{row['recovered_s']:>12.1f}  {row['answers']}")
    if options.json:
        write_result(options.json, seed=None, measured={"rows": rows})
    return 0


def recovery(pool: RayPool, loss: str, lose: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Lose prefill-1 in this way, under load."""
    before = pool.member("prefill-1")
    with pool.load() as answers:
        lose(before)
        noticed_s = pool.wait(lambda: pool.member("prefill-1")["state"] != "ready", TIMEOUT_S)
        recovered_s = noticed_s + pool.wait(lambda: all(s == "ready" for s in pool.states().values()), TIMEOUT_S)
    return {
        "loss": loss,
        "noticed_s": round(noticed_s, 2),
        "recovered_s": round(recovered_s, 2),
        "reason": pool.member("prefill-1")["last_failure"].splitlines()[0],
        "answers": dict(Counter(answers)),
    }


def parent_of(pid: int) -> int:
    """The actor of a server process."""
    return psutil.Process(pid).ppid()


def scheduler_of(pid: int) -> psutil.Process:
    """The process of a server that computes."""
    children = psutil.Process(pid).children(recursive=True)
    return next(child for child in children if child.name().startswith("sglang::sched"))


def lose_node(nodes: Any, node_id: str) -> None:  # Ray's test cluster, untyped
    """Kill the node's Ray processes."""
    (lost,) = [node for node in nodes.worker_nodes if node.node_id == node_id]
    nodes.remove_node(lost, allow_graceful=False)


if __name__ == "__main__":
    sys.exit(main())
