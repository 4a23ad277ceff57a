"""Prefill workers of several configurations, alive side by side, one of them under load at a time.

Each configuration has a prefill worker and a router of its own; all routers share one decode instance. So the
configurations can be measured in turns, which a machine that is faster now than then cannot tell apart.

On two cores or more, each worker's scheduler process runs on the first and everything else on the others: HTTP,
tokenization, routers, decode and the client do not take the prefill's core, in any configuration.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import psutil

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.cluster.process import PARENT_VARIABLE, ChildProcess
from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.observe.recording import Recording, decode
from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_tiny_model

DEEP_SHAPE = TinyModelShape(num_hidden_layers=8, hidden_size=64, intermediate_size=128)
"""Eight thin layers, 41 operators: the default model's four layers would make an operator a far larger part of a
prefill than it is in real models, which have 32 layers and more."""
KV_POOL_TOKENS = 32_768
_STARTUP_S = 600.0
_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way to schedule prefills."""

    name: str
    flags: tuple[str, ...]
    """Of the prefill worker."""
    script: Path | None = None
    """A Python file that stands in for ``python -m flowprefill_sglang`` in starting the worker."""

    @property
    def is_stock(self) -> bool:
        """Whether SGLang's own scheduler runs."""
        return "stock" in self.flags


def flowprefill(policy: str = "feasible", *flags: str, name: str = "flowprefill") -> Configuration:
    """Ours, with a policy."""
    return Configuration(name=name, flags=("--scheduler-policy", policy, *flags))


def stock(name: str, *flags: str) -> Configuration:
    """SGLang's own scheduler, with its own flags."""
    return Configuration(name=name, flags=("--prefill-scheduler", "stock", *flags))


STOCK_UNCHUNKED = stock("fcfs", "--schedule-policy", "fcfs", "--chunked-prefill-size", "-1")


def stock_chunked(tokens: int) -> Configuration:
    """First come, first served, in chunks."""
    return stock(f"fcfs-{tokens}", "--schedule-policy", "fcfs", "--chunked-prefill-size", str(tokens))


@dataclass(kw_only=True)
class LiveWorker:
    """One configuration that is up."""

    name: str
    url: str
    """Of its router."""
    worker_url: str
    """Of SGLang's own HTTP endpoint."""
    scheduler_pid: int = 0

    async def timeline(self, seconds: float) -> Recording:
        """The scheduler's events of the last so many seconds."""
        return decode(await _get(f"{self.worker_url}/flowprefill/timeline?seconds={seconds:.3f}"))

    async def drained(self, timeout_s: float = 120.0) -> None:
        """Wait until nothing is under way, and empty the prefix cache. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while True:
                async with session.post(f"{self.worker_url}/flush_cache") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(0.1)

    def scheduler_cpu_s(self) -> float:
        """CPU seconds that the scheduler process has used since its start, all threads."""
        times = psutil.Process(self.scheduler_pid).cpu_times()
        return float(times.user + times.system)


async def _get(url: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(url, raise_for_status=True) as response:
        return await response.read()


class ScriptProcess(ChildProcess):
    """A Python script in place of the ``flowprefill`` command."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )


class LiveWorkers:
    """``async with LiveWorkers(model, configurations) as live: live["flowprefill"].url``"""

    def __init__(
        self,
        model: Path,
        configurations: Sequence[Configuration],
        *,
        log_dir: Path | None = None,
        flags: Sequence[str] = ("--max-total-tokens", str(KV_POOL_TOKENS)),
        environment: dict[str, str] | None = None,
    ) -> None:
        """``flags`` and ``environment`` are for every SGLang server."""
        self._model = ["--model-path", str(model), "--host", "127.0.0.1", *flags]
        self._configurations = configurations
        self._scratch = Path(tempfile.mkdtemp(prefix="flowprefill-bench-"))
        self._log_dir = log_dir or self._scratch
        self._environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(self._scratch)}
        self._environment["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        self._environment |= environment or {}
        self._children: list[ChildProcess] = []
        self._workers: dict[str, LiveWorker] = {}
        self.decode_url = ""
        self._own_cores: set[int] | None = None
        self.is_pinned = False

    def __getitem__(self, name: str) -> LiveWorker:
        """Raises KeyError."""
        return self._workers[name]

    def pid(self, name: str) -> int:
        """Process id of ``router-NAME``, ``prefill-NAME`` or ``decode``. Raises StopIteration."""
        return next(child.pid for child in self._children if child.name == name)

    async def __aenter__(self) -> Self:
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            self._spawn_all()
            async with asyncio.timeout(_STARTUP_S):
                await asyncio.gather(*(self._until_ready(worker) for worker in self._workers.values()))
            self._find_schedulers()
            self._pin()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    def _spawn_all(self) -> None:
        ports = map(str, free_ports(1 + 4 * len(self._configurations)))
        decode_port = next(ports)
        self.decode_url = f"http://127.0.0.1:{decode_port}"
        self._spawn("decode", ["decode", *self._model, "--port", decode_port])
        for configuration in self._configurations:
            name, port, link, http, bootstrap = configuration.name, next(ports), next(ports), next(ports), next(ports)
            bind = f"tcp://127.0.0.1:{link}"
            listen = ["--port", port, "--worker-bind", bind, "--decode", self.decode_url]
            # A benchmark decides itself how much may wait.
            self._spawn(f"router-{name}", ["router", *listen, "--queue-size", "100000", "--queue-timeout-secs", "600"])
            own = ["--router", bind, "--name", name, "--port", http, "--disaggregation-bootstrap-port", bootstrap]
            arguments = ["prefill", *own, *self._model, *configuration.flags]
            self._spawn(f"prefill-{name}", arguments, configuration.script)
            self._workers[name] = LiveWorker(
                name=name, url=f"http://127.0.0.1:{port}", worker_url=f"http://127.0.0.1:{http}"
            )

    def _spawn(self, name: str, arguments: list[str], script: Path | None = None) -> None:
        log = self._log_dir / f"{name}.log"
        if script is None:
            self._children.append(ChildProcess(name, arguments, log, self._environment))
        else:
            self._children.append(ScriptProcess(name, [str(script), *arguments], log, self._environment))

    async def _until_ready(self, worker: LiveWorker) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                for child in self._children:
                    if child.exit_status is not None:
                        raise StartupError(f"{child.name} ended while starting: {child.last_words()[-2000:]}")
                try:
                    async with session.get(f"{worker.url}/readiness") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)

    def _find_schedulers(self) -> None:
        for child in self._children:
            kind, _, name = child.name.partition("-")
            if kind != "prefill":
                continue
            for process in psutil.Process(child.pid).children(recursive=True):
                if "".join(process.cmdline()).startswith("sglang::scheduler"):
                    self._workers[name].scheduler_pid = process.pid

    def _pin(self) -> None:
        """Every thread that exists; those that come later inherit from the one that starts them."""
        if not hasattr(os, "sched_setaffinity"):
            return
        self._own_cores = os.sched_getaffinity(0)
        first, *others = sorted(self._own_cores)
        if not others:
            return
        schedulers = {worker.scheduler_pid for worker in self._workers.values()}
        mine = [psutil.Process(child.pid) for child in self._children]
        everything = [p for process in mine for p in (process, *process.children(recursive=True))]
        for process in (*everything, psutil.Process()):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {first} if process.pid in schedulers else set(others))
        self.is_pinned = True

    async def _stop(self) -> None:
        for child in self._children:
            child.interrupt()
        for _ in range(int(_GRACE_S * 10)):
            if all(child.exit_status is not None for child in self._children):
                break
            await asyncio.sleep(0.1)
        for child in self._children:
            child.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._own_cores is not None:
            os.sched_setaffinity(0, self._own_cores)


def bench_model(layers: int | None = None) -> tuple[Path, TinyModelShape]:
    """The deep model, or one with another number of layers, and its shape."""
    shape = DEEP_SHAPE if layers is None else replace(DEEP_SHAPE, num_hidden_layers=layers)
    return make_tiny_model(shape=shape), shape
