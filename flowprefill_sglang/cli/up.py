"""``flowprefill up``: a whole cluster on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
from pathlib import Path

from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent, LocalCluster
from flowprefill_sglang.workload.tiny_model import make_tiny_model


def add_up_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``up``; others go to every SGLang server."""
    parser.add_argument("--model-path", type=Path, default=None, help="model folder (default: a tiny one made here)")
    parser.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill workers (default 1)")
    parser.add_argument("--decode", type=_count, default=1, metavar="M", help="decode instances (default 1)")
    parser.add_argument("--host", default="127.0.0.1", help="address the router listens on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="the router's port, 0 for a free one (default 30000)")
    parser.add_argument("--ready-file", type=Path, default=None, help="JSON written once requests are accepted")
    parser.add_argument("--log-dir", type=Path, default=None, help="where each process writes its log")
    parser.add_argument("--router-args", default="", metavar="'FLAGS'", help="flags for the router, in one string")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def run_up(namespace: argparse.Namespace) -> int:
    """Run the cluster; 0 after Ctrl-C or SIGTERM, 1 when a process ends by itself."""
    spec = ClusterSpec(
        model_path=(namespace.model_path or make_tiny_model()).resolve(),
        prefill=namespace.prefill,
        decode=namespace.decode,
        host=namespace.host,
        port=namespace.port,
        router_arguments=tuple(shlex.split(namespace.router_args)),
        sglang_arguments=tuple(namespace.rest),
        log_dir=namespace.log_dir,
    )
    ready_file: Path | None = namespace.ready_file
    try:
        return asyncio.run(_run(spec, ready_file))
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


async def _run(spec: ClusterSpec, ready_file: Path | None) -> int:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    cluster = LocalCluster(spec, print_progress)
    starting = asyncio.create_task(cluster.start())
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
        if stopped.is_set():
            return 0
        await starting
        print(f"ready: {cluster.url}  (logs in {cluster.log_dir}; Ctrl-C ends it)", flush=True)
        if ready_file is not None:
            _write_ready_file(ready_file, cluster)
        watching = asyncio.create_task(cluster.watch())
        await asyncio.wait([watching, stop], return_when=asyncio.FIRST_COMPLETED)
        if not stopped.is_set():
            await watching  # raises: it returns for no other reason
        watching.cancel()
        return 0
    finally:
        starting.cancel()
        stop.cancel()
        await asyncio.wait([starting, stop])
        print("stopping", file=sys.stderr, flush=True)
        await cluster.stop(keep_logs=not stopped.is_set())


def print_progress(event: LaunchEvent) -> None:
    """One line a step, for a terminal or a log."""
    print(f"[{event.elapsed_s:6.1f} s] {event.name:<10} {event.state:<8} {event.detail}".rstrip(), flush=True)


def _write_ready_file(path: Path, cluster: LocalCluster) -> None:
    """In one step, so that a reader never sees half of it."""
    document = {
        "url": cluster.url,
        "workers": [
            {"name": name, "url": cluster.member_url(name), "pid": cluster.pid(name)} for name in cluster.names()
        ],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)
