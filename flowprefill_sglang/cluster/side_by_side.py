"""Prefill workers of several configurations, alive side by side, one of them under load at a time.

Each configuration has a prefill worker and a router of its own; all routers share one decode instance. So the
configurations can be measured in turns, which a machine that is faster now than then cannot tell apart.

On two cores or more, each worker's scheduler process runs on the first and everything else on the others: HTTP,
tokenization, routers, decode and the client do not take the prefill's core, in any configuration.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from flowprefill_sglang.cluster import placement
from flowprefill_sglang.cluster.configurations import Configuration
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.cluster.process import (
    FLOWPREFILL,
    WRONG_USE,
    ChildProcess,
    describe_exit,
    end,
    server_environment,
)
from flowprefill_sglang.errors import BadInput, FlowPrefillError, PeerFault, StartupError
from flowprefill_sglang.observe.recording import Recording, decode

KV_POOL_TOKENS = 32_768
_STARTUP_S = 600.0
_GRACE_S = 10.0
_POLL_INTERVAL_S = 0.2


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
        """Wait until nothing is under way, and empty the prefix cache. Raises PeerFault when that does not come."""
        try:
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
                while True:
                    async with session.post(f"{self.worker_url}/flush_cache") as response:
                        if response.status == 200:
                            return
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise PeerFault(f"the prefill worker {self.name} was still busy after {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise PeerFault(f"no answer from the prefill worker {self.name}: {error}") from error

    def scheduler_cpu_s(self) -> float:
        """CPU seconds that the scheduler process has used since its start, all threads."""
        return placement.cpu_s(self.scheduler_pid)


async def _get(url: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(url, raise_for_status=True) as response:
        return await response.read()


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
        self._environment = server_environment(str(self._scratch), threads=1) | (environment or {})
        self._children: list[ChildProcess] = []
        self._workers: dict[str, LiveWorker] = {}
        self.decode_url = ""
        self._placement: placement.Placement | None = None

    def __getitem__(self, name: str) -> LiveWorker:
        """Raises KeyError."""
        return self._workers[name]

    @property
    def is_pinned(self) -> bool:
        """Whether scheduler processes have a core of their own."""
        return self._placement is not None

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
            self._placement = placement.set_schedulers_apart(
                [child.pid for child in self._children],
                {worker.scheduler_pid for worker in self._workers.values()},
            )
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
            self._spawn(f"prefill-{name}", arguments, configuration.program)
            self._workers[name] = LiveWorker(
                name=name, url=f"http://127.0.0.1:{port}", worker_url=f"http://127.0.0.1:{http}"
            )

    def _spawn(self, name: str, arguments: list[str], program: Sequence[str] = FLOWPREFILL) -> None:
        log = self._log_dir / f"{name}.log"
        self._children.append(ChildProcess(name, arguments, log, self._environment, program))

    async def _until_ready(self, worker: LiveWorker) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                self._raise_if_one_ended(StartupError, "while starting")
                try:
                    async with session.get(f"{worker.url}/readiness") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(_POLL_INTERVAL_S)

    def _raise_if_one_ended(self, error: type[FlowPrefillError], when: str) -> None:
        for child in self._children:
            status = child.exit_status
            if status == WRONG_USE:
                raise BadInput(f"{child.name} does not take these flags: {child.last_words(1)}")
            if status is not None:
                raise error(f"{child.name} {describe_exit(status)} {when}; its log ends with: {child.last_words(1)}")

    async def watch(self) -> None:
        """Never returns; raises PeerFault when a process ends by itself."""
        while True:
            self._raise_if_one_ended(PeerFault, "under load")
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _find_schedulers(self) -> None:
        for child in self._children:
            kind, _, name = child.name.partition("-")
            if kind == "prefill":
                self._workers[name].scheduler_pid = placement.scheduler_of(child.pid)

    async def _stop(self) -> None:
        await asyncio.to_thread(end, self._children, (_GRACE_S,))
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._placement is not None:
            self._placement.undo()
