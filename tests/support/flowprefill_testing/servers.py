"""Servers of a test session: started, waited for, ended; and gone when the session itself is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowprefill_sglang.cluster.process import PARENT_VARIABLE
from flowprefill_testing.clusters import CONTEXT_TOKENS, Cluster, wait_until

STRICT = {
    # SGLang then counts every KV slot, lock and request row whenever it is idle, and stops when one has leaked.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "HF_HUB_OFFLINE": "1",
}

STOCK_SERVER = (
    "-c",
    "import runpy; from flowprefill_sglang.cluster.process import die_with_parent; die_with_parent(); "
    "runpy.run_module('sglang.launch_server', run_name='__main__')",
)
"""Python's arguments that run a stock SGLang server, which like a ``flowprefill`` command heeds ``with_us``."""


def with_support() -> dict[str, str]:
    """Environment of a command that imports ``flowprefill_testing``, as tests do."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}


def with_us() -> dict[str, str]:
    """Environment of a command that is to die with this process, however this process dies."""
    return {PARENT_VARIABLE: str(os.getpid())}


def environment(directory: Path) -> dict[str, str]:
    """Of servers that die with this process and whose temporary files go to a folder in ``directory``."""
    temporary = directory / "tmp"
    temporary.mkdir()
    return {**os.environ, **STRICT, **with_us(), "TMPDIR": str(temporary)}


def sizes(model_path: Path) -> list[str]:
    """Flags of every server of a session."""
    return ["--model-path", str(model_path), "--context-length", str(CONTEXT_TOKENS), "--max-total-tokens", "40000"]


@contextmanager
def started_up(flags: list[str], directory: Path) -> Iterator[Cluster]:
    """A cluster by ``flowprefill up``, ended with the block."""
    ready_file, log_dir, up_log = directory / "ready.json", directory / "logs", directory / "up.log"
    files = ["--port", "0", "--ready-file", str(ready_file), "--log-dir", str(log_dir)]
    with up_log.open("wb") as out:
        up = subprocess.Popen(
            [sys.executable, "-m", "flowprefill_sglang", "up", *files, *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(directory),
        )
    try:
        wait_until(ready_file.exists, up, up_log)
        document = json.loads(ready_file.read_text())
        workers = {worker["name"]: worker for worker in document["workers"]}
        yield Cluster(document["url"], workers, log_dir, up, ready_file)
    finally:
        end(up)


def end(process: subprocess.Popen) -> None:
    """Interrupt it, and kill it if that does not help."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
