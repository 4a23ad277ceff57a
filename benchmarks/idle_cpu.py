"""CPU time of an idle prefill worker's scheduler process: FlowPrefill, and stock SGLang with and without sleep-on-idle.

All of them are idle at the same time. The scheduler process is the one that SGLang's own loop keeps busy when it waits
for work by asking again and again; the worker's other processes are reported beside it.

    python benchmarks/idle_cpu.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.cluster.configurations import flowprefill, stock
from flowprefill_sglang.cluster.side_by_side import LiveWorker, LiveWorkers
from flowprefill_sglang.workload.tiny_model import make_deep_model

SPINNING = replace(stock("stock"), program=(str(Path(__file__).parent / "spinning_worker.py"),))
CONFIGURATIONS = (flowprefill(), stock("stock-sleep-on-idle", "--sleep-on-idle"), SPINNING)
"""The project's CPU platform sets ``--sleep-on-idle`` for every server; the last one is what SGLang does without."""


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of an idle stretch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run: five seconds")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 5.0
    rows = asyncio.run(measure(options))
    if options.json:
        write_result(options.json, seed=None, measured={"rows": rows})
    return 0


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each worker and stretch."""
    model, _ = make_deep_model()
    rows = []
    async with LiveWorkers(model, CONFIGURATIONS, log_dir=options.log_dir) as live:
        workers = [live[configuration.name] for configuration in CONFIGURATIONS]
        for repeat in range(options.repeats):
            for worker in workers:
                await worker.drained()
            before = [(worker.scheduler_cpu_s(), others_cpu_s(worker)) for worker in workers]
            began_at = time.monotonic()
            await asyncio.sleep(options.seconds)
            for worker, (scheduler_s, others_s) in zip(workers, before, strict=True):
                row = {
                    "configuration": worker.name,
                    "repeat": repeat,
                    "idle_s": round(time.monotonic() - began_at, 3),
                    "scheduler_cpu_s": round(worker.scheduler_cpu_s() - scheduler_s, 3),
                    "others_cpu_s": round(others_cpu_s(worker) - others_s, 3),
                }
                rows.append(row)
                print(row, flush=True)
    return rows


def others_cpu_s(worker: LiveWorker) -> float:
    """CPU seconds of the worker's other processes: HTTP with the link to the router, and the detokenizer."""
    parent = psutil.Process(worker.scheduler_pid).parent()
    assert parent is not None  # it is alive
    others = [parent, *(p for p in parent.children(recursive=True) if p.pid != worker.scheduler_pid)]
    return float(sum(process.cpu_times().user + process.cpu_times().system for process in others))


if __name__ == "__main__":
    sys.exit(main())
