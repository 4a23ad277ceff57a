"""``flowprefill up``: a whole cluster on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path

from flowprefill_sglang.cli.start_display import StartDisplay
from flowprefill_sglang.cluster.configuration_file import Configured, read_configuration
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool_starting import RunningPool, pool_here, pool_on_ray
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import count
from flowprefill_sglang.prefill_worker.settings import SchedulerKind
from flowprefill_sglang.workload.tiny_model import make_tiny_model


def add_up_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``up``; others go to every SGLang server."""
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="YAML file of the cluster; other flags win over it"
    )
    parser.set_defaults(configured=None)
    parser.add_argument("--model-path", type=Path, default=None, help="model folder (default: a tiny one made here)")
    parser.add_argument("--prefill", type=count, default=1, metavar="N", help="prefill workers (default 1)")
    parser.add_argument("--decode", type=count, default=1, metavar="M", help="decode instances (default 1)")
    parser.add_argument("--host", default="127.0.0.1", help="address the router listens on (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=30000, help="the router's port, 0 for a free one (default 30000)")
    parser.add_argument(
        "--launcher", choices=("local", "ray"), default="local", help="what runs the servers (default: %(default)s)"
    )
    parser.add_argument(
        "--ray-address", default=None, metavar="A", help="Ray cluster to join: HOST:PORT or auto (default: a new one)"
    )
    parser.add_argument(
        "--share-gpus", action="store_true", help="every server sees all GPUs of this machine, instead of its own alone"
    )
    parser.add_argument("--ready-file", type=Path, default=None, help="JSON written once requests are accepted")
    parser.add_argument("--log-dir", type=Path, default=None, help="where each process writes its log")
    parser.add_argument("--api-key", default=None, metavar="KEY", help="bearer token that clients must send")
    parser.add_argument(
        "--prefill-scheduler",
        type=SchedulerKind,
        choices=list(SchedulerKind),
        default=SchedulerKind.FLOWPREFILL,
        help="preemptive and deadline-aware, or SGLang's own for comparison (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill-args",
        type=_flags,
        default=(),
        metavar="'FLAGS'",
        help="flags for the prefill workers alone, in one string",
    )
    parser.add_argument(
        "--router-args", type=_flags, default=(), metavar="'FLAGS'", help="flags for the router, in one string"
    )


def set_up_defaults(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Take the flags' defaults from ``--config``, when it is given. Raises BadInput."""
    if namespace.config is None:
        return
    configured = read_configuration(namespace.config)
    parser.set_defaults(
        configured=configured,
        model_path=configured.model_path,
        prefill=configured.prefill,
        decode=configured.decode,
        host=configured.host,
        port=configured.port,
        log_dir=configured.log_dir,
        api_key=configured.api_key,
        prefill_scheduler=SchedulerKind(configured.prefill_scheduler),
        launcher=configured.launcher,
        ray_address=configured.ray_address,
        share_gpus=configured.share_gpus,
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, or 0 for a free one, got {text}")
    return int(text)


def _flags(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected flags as a shell would take them, got {text}: {error}") from error


def run_up(namespace: argparse.Namespace) -> int:
    """Run the cluster until it is told to stop. 0 after Ctrl-C or SIGTERM, 128 plus the signal's number when it came
    before the cluster was ready. Raises StartupError, BadInput and PeerFault."""
    ready_file: Path | None = namespace.ready_file
    if ready_file is not None:
        _require_writable(ready_file)
    file: Configured | None = namespace.configured
    spec = ClusterSpec(
        model_path=(namespace.model_path or make_tiny_model()).absolute(),  # a link may lead elsewhere on another node
        prefill=namespace.prefill,
        decode=namespace.decode,
        host=namespace.host,
        port=namespace.port,
        api_key=namespace.api_key,
        # Of a flag that comes twice, the later one wins: the command line's.
        router_arguments=(*(file.router_arguments if file else ()), *namespace.router_args),
        prefill_arguments=(
            "--prefill-scheduler",
            str(namespace.prefill_scheduler),
            *(file.prefill_arguments if file else ()),
            *namespace.prefill_args,
        ),
        decode_arguments=file.decode_arguments if file else (),
        sglang_arguments=(*(file.sglang_arguments if file else ()), *namespace.rest),
        threads=file.threads if file else None,
        share_gpus=namespace.share_gpus,
        startup_timeout_s=file.startup_timeout_s if file else ClusterSpec.startup_timeout_s,
        log_dir=namespace.log_dir.absolute() if namespace.log_dir is not None else None,
    )
    if namespace.ray_address is not None and namespace.launcher != "ray":
        raise BadInput("--ray-address needs --launcher ray")
    if namespace.share_gpus and namespace.launcher == "ray":
        raise BadInput("--share-gpus needs --launcher local: on Ray every server has GPUs of its own")
    if namespace.launcher == "ray":
        cluster = pool_on_ray(spec, namespace.ray_address, StartDisplay())
    else:
        cluster = pool_here(spec, StartDisplay())
    if ready_file is None:
        return asyncio.run(_run(cluster, None))
    ready_file.unlink(missing_ok=True)  # of a launcher that was killed
    try:
        return asyncio.run(_run(cluster, ready_file))
    finally:
        ready_file.unlink(missing_ok=True)


async def _run(cluster: RunningPool, ready_file: Path | None) -> int:
    stop = _stop_on_signals(cluster)
    try:
        await _first_of(cluster.start(), stop)
        if stop.done():
            return 128 + stop.result()
        print_ready(cluster)
        if ready_file is not None:
            _write_ready_file(ready_file, cluster)
        await _first_of(cluster.watch(), stop)
        return 0
    finally:
        if cluster.names():
            print("stopping; press Ctrl-C again to cut it short", file=sys.stderr, flush=True)
        await cluster.stop(keep_logs=not stop.done())


def _stop_on_signals(cluster: RunningPool) -> asyncio.Future[int]:
    """Set to the signal's number by the first one; the second one hurries the cluster's end."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def on_signal(number: int) -> None:
        if stop.done():
            cluster.hurry()
        else:
            stop.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def _first_of(work: Coroutine[None, None, None], stop: asyncio.Future[int]) -> None:
    """Wait for ``work``, raising what it raises, or for the signal, which cancels it."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
    if not stop.done():
        task.result()
        return
    task.cancel()
    await asyncio.wait([task])


def print_ready(cluster: RunningPool) -> None:
    """Where the cluster is, and a request to try."""
    key = "-H 'authorization: Bearer KEY' " if cluster.spec.api_key else ""
    body = '{"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16}}'
    print(
        f"""
ready     {cluster.url}   (OpenAI clients: {cluster.url}/v1)
model     {cluster.model}
try       curl {cluster.url}/generate {key}-H 'content-type: application/json' -d '{body}'
workers   curl {key}{cluster.url}/workers
logs      {cluster.log_dir}
control   {cluster.control}   (flowprefill status --control {cluster.control}; scale, logs)
Ctrl-C ends it.""",
        flush=True,
    )


def _require_writable(ready_file: Path) -> None:
    """Now, not after minutes of loading."""
    if ready_file.is_dir() or not os.access(ready_file.absolute().parent, os.W_OK):
        raise BadInput(f"--ready-file {ready_file}: expected a file in a folder that exists and can be written to")


def _write_ready_file(path: Path, cluster: RunningPool) -> None:
    """In one step, so that a reader never sees half of it."""
    document = {
        "url": cluster.url,
        "control": cluster.control,
        "workers": [
            {"name": name, "url": cluster.member_url(name), "pid": cluster.pid(name)} for name in cluster.names()
        ],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)
