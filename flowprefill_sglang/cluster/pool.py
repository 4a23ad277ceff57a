"""A cluster whose members are kept alive: the shell around the supervisor.

One loop in the launcher's process looks at every member and at the router's list of workers a few times a second, tells
the supervisor, and does what it says. The router is a child of this process; members run wherever the host puts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.log_progress import Doings
from flowprefill_sglang.cluster.members import Host, Order, Sight, arguments_of
from flowprefill_sglang.cluster.ports import free_ports, local_url
from flowprefill_sglang.cluster.process import ChildProcess, describe_exit
from flowprefill_sglang.cluster.supervision import (
    Action,
    Drain,
    Ended,
    Event,
    Kind,
    Member,
    MemberState,
    Patience,
    Remove,
    Running,
    Scaled,
    Start,
    Supervisor,
    Tick,
    Waiting,
)
from flowprefill_sglang.errors import BadInput, PeerFault, StartupError

log = logging.getLogger(__name__)
_PERIOD_S = 0.3
_ROUTER_GRACE_S = 8.0


class Pool:
    """What ``up`` starts, watches and ends. ``url`` accepts requests once ``start`` has returned."""

    def __init__(
        self,
        spec: ClusterSpec,
        host: Host,
        address: str,
        on_progress: Callable[[LaunchEvent], None] | None = None,
    ) -> None:
        """``address``: this machine's, as the members reach it."""
        self.spec = spec
        self.url = ""
        self.model = ""
        self._host = host
        self._address = address
        self._on_progress = on_progress or (lambda event: None)
        self._supervisor = Supervisor(Patience(start_s=spec.startup_timeout_s))
        self._sights: dict[str, Sight] = {}
        self._reported: dict[str, tuple[str, str]] = {}
        self._doings = Doings(host.log, self._tell_doing)
        self._router: ChildProcess | None = None
        self._worker_bind = ""
        self._folder: Path | None = None
        self._session: aiohttp.ClientSession | None = None
        self._started_at = 0.0
        self._in_a_hurry = asyncio.Event()
        self._is_up = False
        self._acting = asyncio.Lock()

    @property
    def log_dir(self) -> Path:
        """Where the router's log is. Members' logs are on their nodes."""
        assert self._folder is not None
        return self.spec.log_dir or self._folder

    async def start(self) -> None:
        """Start everything and wait until requests are accepted.

        Raises StartupError for the first member that fails meanwhile, and BadInput when one does not take its flags.
        Call ``stop`` afterwards in either case.
        """
        self._started_at = self._now()
        self._start_router()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5), headers=self._headers())
        await self._handle(Scaled(self.spec.prefill, self.spec.decode))
        deadline = self._started_at + self.spec.startup_timeout_s
        while True:
            await self._round()
            members = self._supervisor.members.values()
            if all(member.state is MemberState.READY for member in members):
                break
            if self._now() > deadline:
                late = "; ".join(f"{m.name} is {m.state}{_because(m)}" for m in members if m.state != "ready")
                raise StartupError(f"not ready after {self.spec.startup_timeout_s:g} s: {late}")
            await asyncio.sleep(_PERIOD_S)
        self._is_up = True

    def _start_router(self) -> None:
        spec = self.spec
        self._folder = Path(tempfile.mkdtemp(prefix="flowprefill-pool-"))
        self.log_dir.mkdir(parents=True, exist_ok=True)
        ports = free_ports(2)
        port = spec.port or ports[0]
        self._worker_bind = f"tcp://{self._address}:{ports[1]}"
        self.url = local_url(spec.host, port)
        key = ["--api-key", spec.api_key] if spec.api_key else []
        listen = ["--host", spec.host, "--port", str(port), "--worker-bind", self._worker_bind]
        arguments = ["router", *listen, *key, *spec.router_arguments]
        self._router = ChildProcess("router", arguments, self.log_dir / "router.log", {"PYTHONUNBUFFERED": "1"})
        self._report("router", "starting", f"pid {self._router.pid}")

    async def watch(self) -> None:
        """Keep the pool at its size until cancelled. Raises PeerFault when the router is gone."""
        while True:
            await self._round()
            await asyncio.sleep(_PERIOD_S)

    async def _round(self) -> None:
        assert self._router is not None
        status = self._router.exit_status
        if status is not None:
            words = f"the router {describe_exit(status)}. The end of {self._router.log}:\n{self._router.last_words()}"
            raise PeerFault(words) if self._is_up else StartupError(words)
        workers = await self._ask_router("GET")
        names = [name for name, m in self._supervisor.members.items() if m.state is not MemberState.BACKING_OFF]
        starts = {name: self._supervisor.members[name].start for name in names}
        sights = await asyncio.gather(*(self._host.look(name) for name in names))
        for name, sight in zip(names, sights, strict=True):
            member = self._supervisor.members.get(name)
            if member is not None and member.start == starts[name]:  # not scaled away meanwhile
                await self._saw(member, sight, workers)
        await self._handle(Tick())
        for member in self._supervisor.members.values():
            self._report(member.name, member.state, self._detail(member))
        self._doings.look_if_due(self._supervisor.members.values(), self._now())

    async def _saw(self, member: Member, sight: Sight, workers: Any) -> None:  # the router's JSON, or None
        name, start = member.name, member.start
        self._sights[name] = sight
        if sight.ended is not None:
            if not self._is_up:
                words = f"{name}: {sight.ended}"
                raise (
                    BadInput(f"{name} does not take these flags: {sight.ended}")
                    if sight.wrong_use
                    else (StartupError(words))
                )
            await self._handle(Ended(name, start, sight.ended))
        elif sight.waiting_for:
            await self._handle(Waiting(name, start, f"waits for {sight.waiting_for}"))
        elif workers is None:
            await self._handle(Running(name, start, None, "the router does not answer"))
        else:
            known = _entry_of(workers, sight.url)
            if member.kind == "decode" and known is None and member.state is not MemberState.DRAINING:
                await self._ask_router("POST", {"url": sight.url, "worker_type": "decode"})
            state = known["state"] if known else "not known to the router"
            if state == "ready" and not self.model:
                self.model = (known or {})["model"]
            # An actor that is slow to answer, on a busy node, is no reason to kill a server that serves.
            why = f" ({known['reason']})" if known and known.get("reason") else ""
            reason = f"the router says: {state}{why}{'' if sight.answered else ', and its actor does not answer'}"
            await self._handle(Running(name, start, state == "ready", reason))

    async def _handle(self, event: Event) -> None:
        async with self._acting:  # what one event asks for is done before the next one is heard
            for action in self._supervisor.handle(event, self._now()):
                await self._do(action)

    async def _do(self, action: Action) -> None:
        match action:
            case Start(name, kind):
                self._host.start(self._order(name, kind))
            case Drain(name):
                sight = self._sights[name]
                if name.startswith("prefill"):
                    await self._ask_router("DELETE", {"name": name})
                else:
                    await self._ask_router("DELETE", {"url": sight.url})
                    await self._host.ask_to_end(name)
            case Remove(name):
                member = self._supervisor.members.get(name)
                self._report(name, member.state if member else "stopped", member.last_failure if member else "")
                sight = self._sights.pop(name, Sight())
                if name.startswith("decode") and sight.url:
                    await self._ask_router("DELETE", {"url": sight.url})
                await self._host.remove(name)

    def _order(self, name: str, kind: Kind) -> Order:
        own = ("--router", self._worker_bind) if kind == "prefill" else ()
        return Order(
            name=name,
            kind=kind,
            model_path=str(self.spec.model_path),
            arguments=(*own, *arguments_of(self.spec, kind)),
            log_dir=str(self.spec.log_dir) if self.spec.log_dir else None,
            environment={"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(self.spec.threads or 1)},
        )

    async def scale(self, prefill: int, decode: int) -> None:
        """Want so many from now on; returns before they are there. Raises StartupError when there is no room."""
        self._host.require_room({"prefill": prefill, "decode": decode})
        await self._handle(Scaled(prefill, decode))

    def status(self) -> dict[str, Any]:
        """What ``GET /status`` answers."""
        now = self._now()
        members = []
        for member in self._supervisor.members.values():
            sight = self._sights.get(member.name, Sight())
            members.append(
                {
                    "name": member.name,
                    "kind": member.kind,
                    "state": str(member.state),
                    "for_s": round(now - member.since, 1),
                    "restarts": member.start - 1,
                    "failures_in_a_row": member.failures,
                    "retry_in_s": round(max(0.0, member.retry_at - now), 1) if member.state == "backing_off" else None,
                    "reason": member.reason,
                    "last_failure": member.last_failure,
                    "doing": self._doings.of(member.name),
                    "url": sight.url,
                    "pid": sight.pid,
                    "node": sight.node,
                }
            )
        return {"url": self.url, "model": self.model, "desired": dict(self._supervisor.desired), "members": members}

    async def logs(self, name: str, lines: int) -> str:
        """The end of a member's log, or the router's. Raises BadInput for an unknown name, PeerFault without a log."""
        if name == "router" and self._router is not None:
            return self._router.log_tail(lines)
        if name not in self._supervisor.members:
            known = ", ".join(["router", *self._supervisor.members])
            raise BadInput(f"no member is called {name!r}; there are: {known}", status=404)
        return await self._host.log(name, lines)

    def targets(self) -> list[dict[str, Any]]:
        """Prometheus' http_sd: the router and every prefill worker, which serve ``/metrics``."""
        rows = [{"targets": [self.url.removeprefix("http://")], "labels": {"name": "router", "role": "router"}}]
        for name, sight in self._sights.items():
            if name.startswith("prefill") and sight.url:
                labels = {"name": name, "role": "prefill"}
                rows.append({"targets": [sight.url.removeprefix("http://")], "labels": labels})
        return rows

    def names(self) -> list[str]:
        """``router``, and the members'."""
        return ["router", *self._supervisor.members] if self._router is not None else []

    def member_url(self, name: str) -> str:
        """HTTP address; raises KeyError for an unknown name."""
        return self.url if name == "router" else self._sights[name].url

    def pid(self, name: str) -> int:
        """Process id, on the member's node; raises KeyError for an unknown name."""
        if name == "router" and self._router is not None:
            return self._router.pid
        return self._sights[name].pid

    async def stop(self, *, keep_logs: bool = False) -> None:
        """End the router, which drains, then all members. ``keep_logs``: leave the temporary folder of a
        pool that has served; what fails before that is quoted in the error."""
        self._doings.close()
        if self._router is not None:
            await self._end_router(self._router)
        if self._session is not None:
            await self._session.close()
        await self._host.end_all()
        if self._folder is not None and not (keep_logs and self._is_up and self.spec.log_dir is None):
            shutil.rmtree(self._folder, ignore_errors=True)

    def hurry(self) -> None:
        """Cut the router's drain short."""
        self._in_a_hurry.set()

    async def _end_router(self, router: ChildProcess) -> None:
        for grace_s in (_ROUTER_GRACE_S, 3.0):
            router.interrupt()
            deadline = self._now() + grace_s
            while router.exit_status is None and self._now() < deadline:
                if grace_s == _ROUTER_GRACE_S and self._in_a_hurry.is_set():
                    break
                await asyncio.sleep(0.05)
        router.kill()

    async def _ask_router(self, method: str, document: dict[str, str] | None = None) -> Any:  # its JSON, or None
        assert self._session is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.request(method, f"{self.url}/workers", json=document) as response:
                return await response.json()
        return None

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.spec.api_key}"} if self.spec.api_key else {}

    def _detail(self, member: Member) -> str:
        if member.state in (MemberState.STARTING, MemberState.BACKING_OFF):
            return member.last_failure if member.state is MemberState.BACKING_OFF else member.reason
        sight = self._sights.get(member.name, Sight())
        return f"{sight.url} pid {sight.pid} node {sight.node[:8]}"

    def _report(self, name: str, state: str, detail: str) -> None:
        """Once for each change."""
        if self._reported.get(name) != (state, detail):
            self._reported[name] = (state, detail)
            self._on_progress(LaunchEvent(name, state, self._now() - self._started_at, detail))

    def _tell_doing(self, member: Member, text: str) -> None:
        now = self._now()
        detail = f"for {now - member.since:.0f} s: {text or 'its log says nothing yet'}"
        self._on_progress(LaunchEvent(member.name, member.state, now - self._started_at, detail, is_step=False))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _entry_of(workers: Any, url: str) -> dict[str, Any] | None:  # the router's JSON, or None
    return next((one for one in (workers or {}).get("workers", ()) if one["url"] == url), None)


def _because(member: Member) -> str:
    return f" ({member.reason})" if member.reason else ""
