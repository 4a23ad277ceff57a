"""A member without SGLang, as a process of its own: ``PROGRAM`` stands for the ``flowprefill`` command in starting it.

It takes the flags that hosts give, joins a router, answers requests after a moment, drains when told to, and ends at
SIGTERM and SIGINT. ``--wrong``, ``--broken`` and ``--stubborn`` are for what hosts must cope with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from flowprefill_sglang.cluster.process import die_with_parent
from flowprefill_sglang.wire.messages import Dispatch, Drain
from flowprefill_testing.stand_ins import DecodeStandIn, PrefillStandIn, echo, good_prefill_answer

_SUPPORT = str(Path(__file__).resolve().parents[1])
PROGRAM = (
    "-c",
    f"import sys; sys.path.insert(0, {_SUPPORT!r}); from flowprefill_testing.stand_in_member import main; main()",
)
_THINKS_S = 0.05
_CHILD = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"]


def main() -> None:
    """Run until it is told to stop."""
    die_with_parent()
    parser = argparse.ArgumentParser("flowprefill member")
    parser.add_argument("kind", choices=("prefill", "decode"))
    for flag in ("--router", "--name", "--model-path", "--host", "--api-key"):
        parser.add_argument(flag)
    for flag in ("--port", "--disaggregation-bootstrap-port"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--wrong", action="store_true", help="do not take the flags")
    parser.add_argument("--stubborn", action="store_true", help="do not end when interrupted, nor let a child end")
    parser.add_argument("--broken", action="store_true", help="fail at once")
    options = parser.parse_args()
    if options.broken:
        sys.exit("flowprefill member: it is broken")
    if options.wrong:
        parser.error("this is wrong")
    child = subprocess.Popen(_CHILD).pid if options.stubborn else 0
    folder, threads = os.environ["TMPDIR"], os.environ.get("OMP_NUM_THREADS")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(f"flags: {sys.argv[1:]}\nfolder: {folder}\nthreads: {threads}\ngpus: {gpus}\nchild: {child}", flush=True)
    sys.exit(asyncio.run(_serve(options)))


async def _serve(options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _told, number, options.stubborn, stop)
    print("ready", flush=True)
    if options.kind == "decode":
        server = await DecodeStandIn(_think_and_echo).start(options.port)
        await stop.wait()
        await server.die()
    elif options.router:
        await _prefill(options, stop)
    else:
        await stop.wait()
    return 0


def _told(number: int, is_stubborn: bool, stop: asyncio.Event) -> None:
    print(f"told: {signal.Signals(number).name}", flush=True)
    if not is_stubborn:
        stop.set()


async def _prefill(options: argparse.Namespace, stop: asyncio.Event) -> None:
    answers: set[asyncio.Task[None]] = set()
    url = f"http://{options.host}:{options.port}"

    async def answer(rid: str, body: dict[str, Any]) -> None:
        await asyncio.sleep(_THINKS_S)
        await worker.answer(rid, 200, good_prefill_answer(body))

    def behave(dispatch: Dispatch, body: dict[str, Any]) -> None:
        task = asyncio.create_task(answer(dispatch.rid, body))
        answers.add(task)
        task.add_done_callback(answers.discard)

    worker = PrefillStandIn(options.router, behave, name=options.name, incarnation=uuid.uuid4().hex, http_url=url)
    await worker.start()
    while not stop.is_set() and not worker.heard(Drain):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.05)
    await asyncio.gather(*answers)
    await worker.leave()


async def _think_and_echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(_THINKS_S)
    return await echo(request, body)


def said(log: str, what: str) -> Sequence[str]:
    """What it has printed as ``WHAT: …``, in order."""
    return [line.partition(": ")[2] for line in log.splitlines() if line.startswith(f"{what}: ")]
