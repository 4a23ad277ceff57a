"""Mixed load for many minutes on a real cluster, and whether anything is left over.

The load alternates between calm, overload and pauses, and mixes all that a worker meets: objectives from tight to none,
prompts long enough to be computed in chunks, shared prefixes, prompts sent again, logprobs, answers in one piece,
several sequences a request, clients that leave, requests aborted by name in the middle of their prefill, and requests
that are wrong. SGLang checks its memory whenever it is idle, and ends the worker if a slot is missing
(``SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE``).

Afterwards, each of these is checked, and a failed one makes the exit status 1:

* every request that was sent ended in exactly one way here, and the router counted exactly one outcome for each;
* every prompt that entered the scheduler left it exactly once, by the worker's events;
* all KV slots of the prefill worker are free again once its prefix cache is emptied, and no task is suspended;
* the worker has as many threads and open files as after the first minute, a few aside;
* memory does not grow: the slope of the resident size of scheduler, HTTP process and router over the second half of the
  run. The HTTP process keeps the worker's events, up to 32 MiB of them; what came of those in that time is taken off.

    python benchmarks/soak.py --minutes 20 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result
from soak_ledger import Ledger, Tally

from flowprefill_sglang.cluster.configurations import flowprefill
from flowprefill_sglang.cluster.side_by_side import KV_POOL_TOKENS, LiveWorker, LiveWorkers
from flowprefill_sglang.prefill_worker.event_feed import CAPACITY_BYTES
from flowprefill_sglang.workload.prompts import LETTERS
from flowprefill_sglang.workload.tiny_model import make_deep_model

CHUNK_TOKENS = 1_024
"""Small, so that many prompts are computed in several tasks."""
PHASES = (("calm", 20.0, 0.4), ("overload", 15.0, 2.5), ("busy", 20.0, 0.9), ("pause", 5.0, 0.0))
"""Name, seconds, and rate as a share of what keeps the machine busy."""
BEHAVIOURS = {
    "plain": 50, "shared_prefix": 12, "again": 5, "leaves": 12, "aborted": 8, "logprobs": 3, "whole": 4, "several": 2,
    "bad_slo": 2, "bad_body": 1, "too_long": 1,
}  # fmt: skip
"""What requests do, by weight."""
SLO_MS = (50, 150, 500, 2_000, 10_000, None)
DRAIN_S = 120.0
MAX_GROWTH_MIB_PER_MINUTE = 1.0
PROCESSES = ("scheduler", "http", "router")
SPARE_THREADS, SPARE_FILES = 4, 16


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace, live: LiveWorkers, worker: LiveWorker) -> None:
        self._options = options
        self._live = live
        self._worker = worker
        self._rng = random.Random(options.seed)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
        )
        self._prefixes = [self._letters(length) for length in (200, 700, 1_500)]
        self._recent: list[str] = []
        self.tally, self.ledger = Tally(), Ledger()
        self.samples: list[dict[str, Any]] = []
        self.began_at = time.monotonic()

    async def run(self) -> None:
        """Load, then wait until nothing is under way."""
        try:
            await asyncio.gather(*(self._request("plain", 300) for _ in range(4)))  # warm
            self.began_at = time.monotonic()
            watch = asyncio.create_task(self._watch())
            await self._load()
            await self._worker.drained(DRAIN_S)
            watch.cancel()
            await asyncio.wait([watch])
            await self._sample("end")
        finally:
            await self._session.close()

    async def _load(self) -> None:
        ends_at = self.began_at + 60 * self._options.minutes
        under_way: set[asyncio.Task[None]] = set()
        for name, seconds, share in self._phases():
            phase_ends_at = min(time.monotonic() + seconds, ends_at)
            while (now := time.monotonic()) < phase_ends_at:
                rate_rps = share * self._options.busy_rps
                wait_s = self._rng.expovariate(rate_rps) if rate_rps else seconds
                await asyncio.sleep(min(wait_s, phase_ends_at - now))
                if rate_rps and time.monotonic() < phase_ends_at:
                    task = asyncio.create_task(self._request(self._behaviour(), self._length()))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
            if name == "pause":
                await asyncio.wait([asyncio.create_task(asyncio.sleep(0)), *under_way], timeout=DRAIN_S)
            if time.monotonic() >= ends_at:
                break
        await asyncio.gather(*under_way)

    @staticmethod
    def _phases() -> Iterator[tuple[str, float, float]]:
        while True:
            yield from PHASES

    def _behaviour(self) -> str:
        return self._rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]

    def _length(self) -> int:
        return min(6_000, max(2, round(self._rng.lognormvariate(5.5, 1.2))))

    def _letters(self, count: int) -> str:
        return "".join(self._rng.choices(LETTERS, k=count))

    # ---- one request ------------------------------------------------------------------------------------------

    async def _request(self, behaviour: str, length: int) -> None:
        """Send one and count its one end."""
        rid = f"soak-{uuid.uuid4().hex}"
        headers = {"content-type": "application/json"}
        slo_ms = self._rng.choice(SLO_MS)
        if slo_ms is not None:
            headers["x-sgl-ttft-slo-ms"] = str(slo_ms)
        if behaviour == "bad_slo":
            headers["x-sgl-ttft-slo-ms"] = "soon"
        body = b"{" if behaviour == "bad_body" else json.dumps(self._body(behaviour, rid, length)).encode()
        self.tally.sent += 1
        asking = asyncio.create_task(self._ask(body, headers))
        patience_s = self._rng.uniform(0, 1.0) if behaviour in ("leaves", "aborted") else None
        if patience_s is not None:
            await asyncio.wait([asking], timeout=patience_s)
            if behaviour == "aborted":
                async with self._session.post(f"{self._worker.url}/abort_request", json={"rid": rid}):
                    pass
            else:
                asking.cancel()
        try:
            end = await asking
        except asyncio.CancelledError:
            end = "left"
        self.tally.count(behaviour, end)

    async def _ask(self, body: bytes, headers: dict[str, str]) -> str:
        try:
            async with self._session.post(f"{self._worker.url}/generate", data=body, headers=headers) as response:
                text = (await response.read()).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"broken: {type(error).__name__}"
        if response.status != 200:
            return f"HTTP {response.status}"
        compact = text.replace(" ", "")
        if '"type":"abort"' in compact:
            return "aborted"
        if '"error":{' in compact:
            return "error in a 200"
        if "data: [DONE]" in text or not text.startswith("data:"):
            return "complete"
        return "cut off"

    def _body(self, behaviour: str, rid: str, length: int) -> dict[str, Any]:
        prompt = self._letters(length)
        if behaviour == "shared_prefix":
            prompt = self._rng.choice(self._prefixes) + prompt[:200]
        elif behaviour == "again" and self._recent:
            prompt = self._rng.choice(self._recent)
        elif behaviour == "too_long":
            prompt = self._letters(20_000)
        self._recent = [*self._recent[-20:], prompt]
        body: dict[str, Any] = {
            "rid": rid,
            "text": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": self._rng.choice((1, 1, 2, 4))},
            "stream": behaviour != "whole",
        }
        if behaviour == "logprobs":
            body["return_logprob"] = True
        if behaviour == "several":
            body["sampling_params"] |= {"n": 2, "temperature": 1.0}
            body["stream"] = False
        return body

    # ---- watching ---------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await self._sample("load")
            await asyncio.sleep(self._options.sample_secs)

    async def _sample(self, phase: str) -> None:
        """Sizes of every process, and the worker's new events."""
        seconds = 60.0 if not self.ledger.seen_until else time.monotonic() - self.ledger.seen_until + 5
        recording = await self._worker.timeline(seconds)
        self.ledger.add(recording.events, recording.lost)
        row: dict[str, Any] = {"at_s": round(time.monotonic() - self.began_at, 1), "phase": phase}
        for name, process in self._processes().items():
            with process.oneshot():
                row[name] = {
                    "rss_mib": round(process.memory_info().rss / 2**20, 2),
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                }
        row["events_mib"] = round(min(self.ledger.encoded_bytes, CAPACITY_BYTES) / 2**20, 3)
        row["suspended_tasks"] = await self._metric("flowprefill_suspended_tasks")
        row["sent"], row["ended"] = self.tally.sent, sum(self.tally.ended.values())
        row["preemptions"] = self.ledger.preemptions
        self.samples.append(row)
        scheduler = row["scheduler"]
        print(
            f"{row['at_s']:7.0f} s  {row['sent']} sent, {row['ended']} ended, {self.ledger.preemptions} preemptions; "
            f"scheduler {scheduler['rss_mib']:.0f} MiB, {scheduler['threads']} threads, {scheduler['files']} files",
            flush=True,
        )

    def _processes(self) -> dict[str, psutil.Process]:
        scheduler = psutil.Process(self._worker.scheduler_pid)
        http = scheduler.parent()
        assert http is not None  # it is alive
        return {
            "scheduler": scheduler,
            "http": http,
            "router": psutil.Process(self._live.pid(f"router-{self._worker.name}")),
        }

    async def _metric(self, name: str) -> float | None:
        async with self._session.get(f"{self._worker.worker_url}/metrics") as response:
            found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", await response.text(), re.MULTILINE)
        return float(found[1]) if found else None


async def leftovers(soak: Soak, worker: LiveWorker) -> dict[str, Any]:
    """What the servers say once all is over."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{worker.worker_url}/v1/loads") as response:
            (load,) = (await response.json())["loads"]
        async with session.get(f"{worker.url}/server_info") as response:
            router = (await response.json())["flowprefill_router"]
        async with session.post(f"{worker.url}/generate", json={"text": "still there?"}) as response:
            still_works = response.status == 200
    return {
        "kv_used_tokens": load["num_used_tokens"],
        "kv_capacity_tokens": load["memory"]["token_capacity"],
        "in_transfer": load["disaggregation"]["prefill_inflight_queue_reqs"],
        "waiting": load["num_waiting_reqs"],
        "router_outcomes": router["outcomes"],
        "router_running": router["running"],
        "router_waiting": router["waiting"],
        "still_works": still_works,
    }


def growth_mib_per_minute(samples: Sequence[dict[str, Any]], process: str) -> float:
    """Slope of the resident size over the second half of the run, by least squares; of the HTTP process without the
    events that it keeps."""
    half = [row for row in samples if row["at_s"] >= samples[-1]["at_s"] / 2]
    minutes = [row["at_s"] / 60 for row in half]
    sizes = [row[process]["rss_mib"] - (row["events_mib"] if process == "http" else 0.0) for row in half]
    mean_x, mean_y = sum(minutes) / len(half), sum(sizes) / len(half)
    square = sum((x - mean_x) ** 2 for x in minutes)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(minutes, sizes, strict=True)) / square if square else 0.0


def verdicts(soak: Soak, left: dict[str, Any]) -> dict[str, bool]:
    """Every check by name."""
    tally, ledger, samples = soak.tally, soak.ledger, soak.samples
    first = next((row for row in samples if row["at_s"] >= 60), samples[0])["scheduler"]
    last = samples[-1]["scheduler"]
    return {
        "every request ended once here": sum(tally.ended.values()) == tally.sent,
        "no answer was cut off or broken": not any(
            end.startswith(("broken", "cut off", "error in", "HTTP 5")) for end in tally.ended
        ),
        "wrong requests were refused": all(
            set(tally.by_behaviour.get(name, {})) <= {"HTTP 400", "HTTP 413"}
            for name in ("bad_slo", "bad_body", "too_long")
        ),
        "the router counted one outcome a request": sum(left["router_outcomes"].values()) == tally.sent,
        "no outcome is an internal error": not left["router_outcomes"].get("internal_error"),
        "no event was lost": ledger.lost == 0,
        "each prompt left the scheduler once": ledger.arrived == ledger.ended and set(ledger.ended.values()) <= {1},
        "there were preemptions": ledger.preemptions > 0,
        "no KV slot is missing": left["kv_used_tokens"] == 0 and left["in_transfer"] == 0 and left["waiting"] == 0,
        "nothing is left in the router": left["router_running"] == 0 and left["router_waiting"] == 0,
        "no task is suspended": samples[-1]["suspended_tasks"] == 0,
        "threads do not pile up": last["threads"] <= first["threads"] + SPARE_THREADS,
        "files do not pile up": last["files"] <= first["files"] + SPARE_FILES,
        **{
            f"memory of the {name} process does not grow": growth_mib_per_minute(samples, name)
            <= MAX_GROWTH_MIB_PER_MINUTE
            for name in PROCESSES
        },
        "the cluster still works": left["still_works"],
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, _ = make_deep_model()
    configuration = flowprefill(options.policy, "--chunked-prefill-size", str(CHUNK_TOKENS))
    environment = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    async with LiveWorkers(model, [configuration], log_dir=options.log_dir, environment=environment) as live:
        worker = live[configuration.name]
        soak = Soak(options, live, worker)
        await soak.run()
        left = await leftovers(soak, worker)
        found = verdicts(soak, left)
    return {
        "minutes": options.minutes,
        "policy": options.policy,
        "kv_pool_tokens": KV_POOL_TOKENS,
        "chunk_tokens": CHUNK_TOKENS,
        "busy_rps": options.busy_rps,
        "verdicts": found,
        "sent": soak.tally.sent,
        "ended": dict(soak.tally.ended),
        "by_behaviour": {name: dict(ends) for name, ends in soak.tally.by_behaviour.items()},
        "scheduler_outcomes": {outcome.value: count for outcome, count in soak.ledger.outcomes.items()},
        "preemptions": soak.ledger.preemptions,
        "tasks": soak.ledger.tasks,
        "left": left,
        "growth_mib_per_minute": {name: round(growth_mib_per_minute(soak.samples, name), 4) for name in PROCESSES},
        "rows": soak.samples,
    }


def main() -> int:
    """Soak, print, write; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--policy", default="feasible")
    parser.add_argument("--busy-rps", type=float, default=8.0, help="requests per second that keep the worker busy")
    parser.add_argument("--sample-secs", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run: one minute")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.sample_secs = 1.0, 5.0
    result = asyncio.run(measure(options))
    for name in ("sent", "ended", "scheduler_outcomes", "preemptions", "growth_mib_per_minute", "left"):
        print(f"{name}: {result[name]}")
    for name, is_well in result["verdicts"].items():
        print(f"{'ok  ' if is_well else 'FAIL'} {name}")
    if options.json:
        write_result(options.json, seed=options.seed, measured=result)
    return 0 if all(result["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
