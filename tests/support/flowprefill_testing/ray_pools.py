"""``flowprefill up`` as tests see it, with its control port: on this machine alone, or on a Ray cluster of several
nodes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 80 * 2**20
FLAGS = ("--device", "cpu", "--context-length", "4096", "--max-total-tokens", "20000")


@contextlib.contextmanager
def ray_nodes(workers: int, gpus: int = 0) -> Iterator[Any]:
    """A Ray cluster with a head without CPUs and ``workers`` nodes with two each, and with ``gpus`` that Ray is told
    of."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # It kills for what other programs of the machine take. Ray reads the name as it is, in this case.
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
    try:
        for _ in range(workers):
            nodes.add_node(num_cpus=2, num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES)
        yield nodes
    finally:
        nodes.shutdown()


class UpPool:
    """``up``, its control port, and its requests."""

    def __init__(self, model_path: Path, folder: Path, *more: str) -> None:
        self.ready_file, self.log = folder / "ready.json", folder / "up.log"
        self.temporary = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))  # a short path: it holds sockets
        """For the temporary files of ``up``, of its members, and of a Ray of its own. ``clear_away`` removes it."""
        flags = ["--model-path", str(model_path), "--port", "0", "--ready-file", str(self.ready_file)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowprefill_sglang", "up", *flags, *FLAGS, *more],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_ready(self, timeout_s: float = 240.0) -> None:
        """Until requests are accepted. Raises RuntimeError with the output when ``up`` ends first."""
        self.wait(self.ready_file.exists, timeout_s)
        self.document = json.loads(self.ready_file.read_text())

    def wait(self, condition: Callable[[], object], timeout_s: float) -> float:
        """Seconds until the condition is true. Raises RuntimeError when it does not come true."""
        started_at = time.monotonic()
        while not condition():
            if self.process.poll() is not None or time.monotonic() > started_at + timeout_s:
                raise RuntimeError(f"not true: {condition}\n{self.log.read_text()[-5000:]}")
            time.sleep(0.1)
        return time.monotonic() - started_at

    def status(self) -> dict[str, Any]:
        """The control port's."""
        with urllib.request.urlopen(self.document["control"] + "/status", timeout=10) as answer:
            return dict(json.load(answer))

    def member(self, name: str) -> dict[str, Any]:
        """Its row of the status; empty when there is none."""
        return next((m for m in self.status()["members"] if m["name"] == name), {})

    def states(self) -> dict[str, str]:
        """State by name."""
        return {m["name"]: m["state"] for m in self.status()["members"]}

    def restarted(self, name: str, after: int) -> bool:
        """Whether it is ready again, after more restarts than ``after``."""
        member = self.member(name)
        return bool(member) and member["state"] == "ready" and member["restarts"] > after

    def ask(self, number: int, prompt_tokens: int = 200, answer_tokens: int = 4) -> int:
        """HTTP status of one request."""
        ids = [1 + (number * 7 + i) % 200 for i in range(prompt_tokens)]
        sampling = {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling}
        request = urllib.request.Request(
            self.document["url"] + "/generate", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def router_says(self, event: str) -> list[str]:
        """The last lines of the router's log about such events."""
        with urllib.request.urlopen(self.document["control"] + "/logs/router?lines=1000", timeout=10) as answer:
            return [line for line in answer.read().decode().splitlines() if event in line]

    @contextlib.contextmanager
    def load(self, answer_tokens: int = 4) -> Iterator[list[int]]:
        """Two clients that ask one request after another meanwhile; the statuses, complete at the end."""
        statuses: list[int] = []
        done = threading.Event()

        def client(first: int) -> None:
            number = first
            while not done.is_set():
                statuses.append(self.ask(number, answer_tokens=answer_tokens))
                number += 2

        clients = [threading.Thread(target=client, args=(first,)) for first in range(2)]
        for one in clients:
            one.start()
        try:
            yield statuses
        finally:
            done.set()
            for one in clients:
                one.join()

    def clear_away(self) -> None:
        """End it, and remove its temporary files."""
        self.end()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def end(self) -> int:
        """Ctrl-C; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


class RayPool(UpPool):
    """On Ray."""

    def __init__(self, address: str | None, model_path: Path, folder: Path, *more: str) -> None:
        """``address``: of a Ray cluster; None has ``up`` start one of its own."""
        where = [] if address is None else ["--ray-address", address]
        super().__init__(model_path, folder, "--launcher", "ray", *where, *more)
