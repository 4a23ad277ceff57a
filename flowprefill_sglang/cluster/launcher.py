"""A whole cluster on this machine: one router, N prefill workers and M decode instances, as child processes.

For laptops, tests, CI and single-node deployments; Ray does the same job over many nodes. The launcher owns its
children: they are started together, watched, and ended together, whatever happens to the launcher.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp

from flowprefill_sglang.cluster.ports import free_ports, local_url, require_free
from flowprefill_sglang.cluster.process import WRONG_USE, ChildProcess, describe_exit
from flowprefill_sglang.errors import BadInput, PeerFault, StartupError

_POLL_INTERVAL_S = 0.1
_GONE = ("stopped", "failed")
_INTERRUPT_GRACE_S = 8.0
"""Wait after the first interrupt: the router lets running requests end, SGLang ends its children one after another."""
_HURRY_GRACE_S = 3.0
"""Wait after the second one, at which the router aborts what still runs and answers its clients."""

State = Literal["starting", "loading", "ready", "stopped", "failed"]
"""``stopped`` is a child that was told to end by somebody else, a drained worker for example."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What to start."""

    model_path: Path
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    """Address of the router's HTTP port; workers and decode instances listen on the loopback interface."""
    port: int = 0
    """The router's HTTP port; 0 takes a free one."""
    router_arguments: tuple[str, ...] = ()
    api_key: str | None = None
    """The bearer token that clients must send, and the servers ask each other for."""
    sglang_arguments: tuple[str, ...] = ()
    """SGLang flags for every server."""
    prefill_arguments: tuple[str, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    log_dir: Path | None = None
    """Where the children's logs go; default: a temporary folder, removed after a clean end."""
    threads: int | None = None
    """CPU threads of each SGLang server's scheduler; default: the cores divided among the servers. Ignored by GPUs."""
    startup_timeout_s: float = 600.0
    """Large models load for minutes."""


@dataclass(frozen=True)
class LaunchEvent:
    """A step of one child on its way up."""

    name: str
    state: str
    elapsed_s: float
    detail: str = ""
    is_step: bool = True
    """False: ``detail`` says what it is doing, in the state that it is in."""


@dataclass
class _Member:
    process: ChildProcess
    url: str
    state: State = "starting"


class LocalCluster:
    """``async with LocalCluster(spec) as cluster:`` gives a cluster that accepts requests at ``cluster.url``."""

    def __init__(self, spec: ClusterSpec, on_progress: Callable[[LaunchEvent], None] | None = None) -> None:
        self.spec = spec
        self._on_progress = on_progress or (lambda event: None)
        self._members: dict[str, _Member] = {}
        self._log_dir = spec.log_dir
        self._scratch_dir: Path | None = None
        self._started_at = 0.0
        self._in_a_hurry = False
        self.url = ""
        self.model = ""
        """Name of the model, as clients ask for it; known once started."""

    @property
    def log_dir(self) -> Path:
        """Where the children write their logs."""
        assert self._log_dir is not None
        return self._log_dir

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop(keep_logs=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop(keep_logs=kind is not None)

    async def start(self) -> None:
        """Start everything and wait until requests are accepted.

        Raises StartupError, which quotes the guilty log, and BadInput when a process does not take its flags. Call
        ``stop`` afterwards in either case.
        """
        self.check()
        self._started_at = asyncio.get_running_loop().time()
        self._make_folders()
        self._spawn_all()
        await self._wait_until_ready()

    def check(self) -> None:
        """Raise StartupError for what can be known to fail before anything is started."""
        spec = self.spec
        if spec.prefill < 1 or spec.decode < 1:
            raise StartupError("a cluster needs at least one prefill worker and one decode instance")
        if not (spec.model_path / "config.json").is_file():
            raise StartupError(f"no model at {spec.model_path}: it has no config.json")
        require_free(spec.host, spec.port)

    def _make_folders(self) -> None:
        if self._log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="flowprefill-logs-"))
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            (self._log_dir / "router.log").open("ab").close()
        except OSError as error:
            raise StartupError(f"cannot write logs to {self._log_dir}: {error.strerror}") from error
        self._scratch_dir = Path(tempfile.mkdtemp(prefix="flowprefill-"))

    def _spawn_all(self) -> None:
        spec = self.spec
        ports = iter(free_ports(2 + 2 * spec.prefill + spec.decode))
        port = spec.port or next(ports)
        worker_bind = f"tcp://127.0.0.1:{next(ports)}"
        decode_urls = [f"http://127.0.0.1:{next(ports)}" for _ in range(spec.decode)]
        key = ["--api-key", spec.api_key] if spec.api_key else []
        self.url = local_url(spec.host, port)
        listen = ["--host", spec.host, "--port", str(port), "--worker-bind", worker_bind]
        decode_flags = [part for url in decode_urls for part in ("--decode", url)]
        self._spawn("router", self.url, ["router", *listen, *decode_flags, *key, *spec.router_arguments])
        model = ["--model-path", str(spec.model_path), "--host", "127.0.0.1", *key]
        for index in range(spec.prefill):
            name = f"prefill-{index}"
            http_port = str(next(ports))
            own = ["--router", worker_bind, "--name", name, "--port", http_port]
            bootstrap = ["--disaggregation-bootstrap-port", str(next(ports))]
            flags = [*own, *model, *bootstrap, *spec.sglang_arguments, *spec.prefill_arguments]
            self._spawn(name, f"http://127.0.0.1:{http_port}", ["prefill", *flags])
        for index, url in enumerate(decode_urls):
            flags = [*model, "--port", url.rpartition(":")[2], *spec.sglang_arguments, *spec.decode_arguments]
            self._spawn(f"decode-{index}", url, ["decode", *flags])

    def _spawn(self, name: str, url: str, arguments: Sequence[str]) -> None:
        process = ChildProcess(name, arguments, self.log_dir / f"{name}.log", self._environment())
        self._members[name] = _Member(process, url)
        self._report(name, "starting", f"pid {process.pid}")

    def _environment(self) -> dict[str, str]:
        servers = self.spec.prefill + self.spec.decode
        threads = self.spec.threads or max(1, (os.cpu_count() or 1) // servers)
        environment = {"PYTHONUNBUFFERED": "1"}
        if self.spec.threads is not None or "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(threads)
        # SGLang 0.5.23 never removes its IPC sockets and lock files, so they get a folder that we remove. What PyTorch
        # compiles is kept in the temporary folder too, and the next start should find it again.
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            environment["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        environment["TMPDIR"] = str(self._scratch_dir)
        return environment

    async def _wait_until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = self._started_at + self.spec.startup_timeout_s
        headers = {"authorization": f"Bearer {self.spec.api_key}"} if self.spec.api_key else {}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5), headers=headers) as session:
            while True:
                self._raise_if_one_died()
                workers = await _get_json(session, f"{self.url}/workers")
                self._note_progress(workers)
                if all(member.state == "ready" for member in self._members.values()):
                    self.model = workers["workers"][0]["model"]
                    return
                if loop.time() > deadline:
                    late = ", ".join(name for name, member in self._members.items() if member.state != "ready")
                    raise StartupError(
                        f"not ready after {self.spec.startup_timeout_s:.0f} s: {late}; logs are in {self.log_dir}"
                    )
                await asyncio.sleep(_POLL_INTERVAL_S)

    def _note_progress(self, workers: Any) -> None:  # the router's JSON, or None while it starts
        if workers is None:
            return
        ready_urls = {worker["url"] for worker in workers["workers"] if worker["state"] == "ready"}
        for name, member in self._members.items():
            if member.state == "ready":
                continue
            if name == "router" or member.url in ready_urls:
                member.state = "ready"
                self._report(name, "ready", member.url)
            elif member.state == "starting":
                member.state = "loading"
                self._report(name, "loading")

    def _raise_if_one_died(self) -> None:
        for name, member in self._members.items():
            status = member.process.exit_status
            if status is None:
                continue
            self._report(name, "failed", describe_exit(status))
            if status == WRONG_USE:
                raise BadInput(f"{name} does not take these flags: {member.process.last_words()}")
            raise StartupError(
                f"{name} {describe_exit(status)} while the cluster was starting. "
                f"The end of {member.process.log}:\n{member.process.last_words()}"
            )

    def _report(self, name: str, state: State, detail: str = "") -> None:
        elapsed_s = asyncio.get_running_loop().time() - self._started_at
        self._on_progress(LaunchEvent(name, state, elapsed_s, detail))

    def pid(self, name: str) -> int:
        """Process id of a child, e.g. ``prefill-0``; raises KeyError for an unknown name."""
        return self._members[name].process.pid

    def member_url(self, name: str) -> str:
        """HTTP address of a child; raises KeyError for an unknown name."""
        return self._members[name].url

    def names(self) -> list[str]:
        """The children's names: ``router``, ``prefill-0`` …, ``decode-0`` …"""
        return list(self._members)

    async def watch(self) -> None:
        """Report children that end by themselves, for as long as the cluster can serve without them.

        Raises PeerFault when it cannot: the router is gone, or the last prefill worker or decode instance. A lost
        worker is not replaced here; that is what Ray pools are for.
        """
        while True:
            for name, member in self._members.items():
                status = member.process.exit_status
                if status is None or member.state in _GONE:
                    continue
                member.state = "failed" if status else "stopped"
                self._report(name, member.state, f"{describe_exit(status)}; its log is {member.process.log}")
                kind = name.partition("-")[0]
                if not any(m.state not in _GONE for n, m in self._members.items() if n.partition("-")[0] == kind):
                    raise PeerFault(
                        f"the cluster cannot serve any more: {name} {describe_exit(status)}. "
                        f"The end of {member.process.log}:\n{member.process.last_words()}"
                    )
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def stop(self, *, keep_logs: bool = False) -> None:
        """End everything: the router first, so that nothing new arrives, then the servers. Never raises for a child
        that is gone already. ``keep_logs`` concerns the temporary folder; a ``log_dir`` of the caller's is kept."""
        router = self._members.get("router")
        if router is not None:
            await self._end([router.process])
        await self._end([member.process for member in self._members.values()])
        has_logs = bool(self._members)
        self._members.clear()
        if self._scratch_dir is not None:
            shutil.rmtree(self._scratch_dir, ignore_errors=True)
        if self._log_dir is not None and self.spec.log_dir is None and not (keep_logs and has_logs):
            shutil.rmtree(self._log_dir, ignore_errors=True)

    def hurry(self) -> None:
        """Do without the first grace in a ``stop`` that is under way, or to come."""
        self._in_a_hurry = True

    async def _end(self, processes: Sequence[ChildProcess]) -> None:
        """Two interrupts, each with its grace, then the end by force."""
        loop = asyncio.get_running_loop()
        for grace_s, can_be_cut in ((_INTERRUPT_GRACE_S, True), (_HURRY_GRACE_S, False)):
            for process in processes:
                process.interrupt()
            deadline = loop.time() + grace_s
            while any(process.exit_status is None for process in processes):
                if loop.time() > deadline or (can_be_cut and self._in_a_hurry):
                    break
                await asyncio.sleep(_POLL_INTERVAL_S)  # a child's end raises no event that all platforms share
        for process in processes:
            process.kill()


async def _get_json(session: aiohttp.ClientSession, url: str) -> Any:  # any JSON document
    try:
        async with session.get(url) as response:
            return await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None
