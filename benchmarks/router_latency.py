"""The router's own added latency, in front of workers that answer at once.

The load is open loop (Poisson arrivals, drawn from a seed). Every second request goes through the router, the others
straight to the decode stand-in, over connections of the same kind and in the same run, so that whatever the machine
does hits both; the added latency is the difference of the two at the same percentile. Latency runs from the moment of
sending; how late the load generator was against its own plan is reported beside it (the event loop's timers tick in
milliseconds, so about one is to be expected: arrivals then come in small bursts, which is harder on the router).

    python benchmarks/router_latency.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result
from router_stand_ins import BODY, StandIns, request_bytes

TARGETS = ("router", "direct")


@dataclass
class Target:
    """Where one half of the requests goes: idle connections, and what was measured on them."""

    name: str
    host: str
    port: int
    idle: deque[Client] = field(default_factory=deque)
    connections: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0
    all_idle: asyncio.Event = field(default_factory=asyncio.Event)

    def done(self, client: Client) -> None:
        self.idle.append(client)
        if len(self.idle) == self.connections:
            self.all_idle.set()

    async def wait_idle(self) -> None:
        """Until nothing is due on any connection."""
        while len(self.idle) < self.connections:
            self.all_idle.clear()
            await self.all_idle.wait()


class Client(asyncio.Protocol):
    """One keep-alive connection. An answer is complete when its content-length has arrived."""

    def __init__(self, target: Target, loop: asyncio.AbstractEventLoop) -> None:
        self.target = target
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.sent_at = 0.0
        self.busy = False
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a TCP transport

    def send(self, data: bytes) -> None:
        self.busy, self.sent_at = True, perf_counter()
        self.transport.write(data)  # type: ignore[union-attr]  # connected before it is used

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self.buffer[:head_end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r", 1)[0])
        if len(self.buffer) < head_end + 4 + length:
            return
        self.target.latencies_ms.append((perf_counter() - self.sent_at) * 1000)
        if not self.buffer.startswith(b"HTTP/1.1 200"):
            self.target.failed += 1
        self.buffer, self.busy = b"", False
        self.target.done(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self.target.failed += 1


async def measure(
    ports: dict[str, tuple[str, int]], *, rate_rps: float, count: int, seed: int, body: bytes
) -> dict[str, Any]:
    """``count`` requests at ``rate_rps`` in all, half of them to each target; latency runs from when each was sent."""
    loop = asyncio.get_running_loop()
    rng = random.Random(seed)
    targets = [Target(name, *ports[name]) for name in TARGETS]
    for target in targets:
        for _ in range(16 if rate_rps > 10 else 2):
            await connect(target, loop)
    data = request_bytes("/generate", body)
    late_ms = []
    due_at = perf_counter() + 0.05
    for index in range(count):
        due_at += rng.expovariate(rate_rps)
        if (wait_s := due_at - perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        target = targets[index % 2]
        if not target.idle:
            await connect(target, loop)
        late_ms.append((perf_counter() - due_at) * 1000)
        target.idle.pop().send(data)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            for target in targets:
                await target.wait_idle()
    row: dict[str, Any] = {"rate_rps": rate_rps, "requests": count, "seed": seed}
    for target in targets:
        row[target.name] = summary(target.latencies_ms) | {
            "failed": target.failed,
            "missing": count // 2 - len(target.latencies_ms),
            "connections": target.connections,
            "latencies_ms": [round(one, 4) for one in target.latencies_ms],
        }
    row["added_ms"] = {name: row["router"][name] - row["direct"][name] for name in ("p50", "p90", "p99")}
    row["client_late_ms"] = summary(late_ms)
    return row


async def connect(target: Target, loop: asyncio.AbstractEventLoop) -> None:
    _, client = await loop.create_connection(lambda: Client(target, loop), target.host, target.port)
    target.connections += 1
    target.idle.append(client)


def summary(values: list[float]) -> dict[str, float]:
    """Percentiles by rank."""
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))], 4) for p in (50, 90, 99)}


def load(ports: dict[str, tuple[str, int]], options: dict[str, Any], core: int | None, out: Any) -> None:
    """The load generator's process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        out.send(runner.run(measure(ports, **options)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1,100,1000", help="requests per second through the router")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-port", type=int, default=33100)
    parser.add_argument("--prompt-bytes", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    body = BODY % (b"x" * arguments.prompt_bytes)
    context = multiprocessing.get_context("spawn")
    rows = []
    with StandIns(first_port=arguments.first_port) as stand_ins:
        ports = {"router": stand_ins.router, "direct": stand_ins.decode}
        for rate in (float(rate) for rate in arguments.rates.split(",")):
            for repeat in range(arguments.repeats):
                # The other half of the requests goes past the router, so twice as many are sent.
                options = {
                    "rate_rps": 2 * rate,
                    "count": max(20, int(2 * rate * arguments.seconds)) // 2 * 2,
                    "seed": arguments.seed + repeat,
                    "body": body,
                }
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=load, args=(ports, options, stand_ins.other_core, sender))
                cpu_before_s = stand_ins.router_cpu_s()
                process.start()
                sender.close()  # so that a load generator that dies is noticed
                row = receiver.recv()
                process.join()
                requests = len(row["router"]["latencies_ms"])
                row |= {
                    "router_rate_rps": rate,
                    "repeat": repeat,
                    "router_cpu_us_per_request": round((stand_ins.router_cpu_s() - cpu_before_s) / requests * 1e6, 1),
                }
                rows.append(row)
                print(
                    f"{rate:6g} rps  added p50 {row['added_ms']['p50']:.3f} ms  p99 {row['added_ms']['p99']:.3f} ms  "
                    f"(router p99 {row['router']['p99']:.3f}, direct p99 {row['direct']['p99']:.3f}, "
                    f"client late p99 {row['client_late_ms']['p99']:.3f})  "
                    f"router CPU {row['router_cpu_us_per_request']:.0f} us/request  "
                    f"failed {row['router']['failed'] + row['direct']['failed'] + row['router']['missing']}",
                    flush=True,
                )
    if arguments.json is not None:
        write_result(arguments.json, seed=arguments.seed, measured={"rows": rows})
    failed = sum(row[name]["failed"] + row[name]["missing"] for row in rows for name in TARGETS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
