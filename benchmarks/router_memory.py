"""The router's resident memory over many requests: it should stop growing once connections and buffers exist.

A fixed number of clients send one request after the other; every tenth is a stream that its client leaves at once, so
that the paths for aborted requests are measured too.

    python benchmarks/router_memory.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result
from router_stand_ins import BODY, StandIns, request_bytes

CHECKPOINTS = (1_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000)
CLIENTS = 32
LEAVES_EVERY = 10


async def one_client(host: str, port: int, count: int, data: bytes) -> int:
    """Send ``count`` requests; returns how many were answered well or left on purpose."""
    good = 0
    reader, writer = await asyncio.open_connection(host, port)
    for number in range(count):
        writer.write(data)
        if number % LEAVES_EVERY == LEAVES_EVERY - 1:
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
            good += 1
            continue
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        good += head.startswith(b"HTTP/1.1 200")
    writer.close()
    return good


async def send_all(host: str, port: int, count: int, data: bytes) -> int:
    shares = [count // CLIENTS + (index < count % CLIENTS) for index in range(CLIENTS)]
    return sum(await asyncio.gather(*(one_client(host, port, share, data) for share in shares)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=CHECKPOINTS[-1])
    parser.add_argument("--first-port", type=int, default=33200)
    parser.add_argument("--prompt-bytes", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    data = request_bytes("/generate", BODY % (b"x" * arguments.prompt_bytes))
    rows: list[dict[str, Any]] = []
    sent = failed = 0
    with StandIns(first_port=arguments.first_port) as stand_ins:
        started_at = time.monotonic()
        rows.append({"requests": 0, "rss_bytes": stand_ins.router_rss_bytes()})
        for checkpoint in [*(one for one in CHECKPOINTS if one < arguments.requests), arguments.requests]:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                failed += checkpoint - sent - runner.run(send_all(*stand_ins.router, checkpoint - sent, data))
            sent = checkpoint
            rows.append({"requests": sent, "rss_bytes": stand_ins.router_rss_bytes()})
            print(f"{sent:7d} requests  {rows[-1]['rss_bytes'] / 2**20:7.1f} MiB", flush=True)
        wall_s = time.monotonic() - started_at
    if arguments.json is not None:
        measured = {"rows": rows, "wall_s": round(wall_s, 1), "failed": failed}
        write_result(arguments.json, seed=None, measured=measured)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
