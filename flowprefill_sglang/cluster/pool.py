"""A cluster whose members are kept alive: the shell around the supervisor.

One loop in the launcher's process looks at every member and at the router's list of workers a few times a second, tells
the supervisor, and does what it says. The router is a child of this process; members run wherever the host puts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.log_progress import Doings
from flowprefill_sglang.cluster.members import Host, Order, Sight, arguments_of, in_one_line
from flowprefill_sglang.cluster.ports import free_ports, local_url
from flowprefill_sglang.cluster.process import WRONG_USE, ChildProcess, end
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
from flowprefill_sglang.errors import BadInput, FlowPrefillError, PeerFault, StartupError

_PERIOD_S: Final = 0.3
_ROUTER_GRACES_S: Final = (8.0, 3.0)
"""After the first interrupt it lets running requests end; at the second it aborts them and answers their clients."""


class Pool:
    """What ``up`` starts, watches and ends. ``url`` accepts requests once ``start`` has returned."""

    def __init__(
        self,
        spec: ClusterSpec,
        host: Host,
        address: str,
        on_progress: Callable[[LaunchEvent], None] | None = None,
        *,
        replaces: bool = True,
    ) -> None:
        """``address``: this machine's, as the members reach it. ``replaces``: False where a lost member should end
        everything, as in a measurement."""
        self.spec = spec
        self.url = ""
        self.model = ""
        self._host = host
        self._address = address
        self._on_progress = on_progress or (lambda event: None)
        self._replaces = replaces
        self._supervisor = Supervisor(Patience(start_s=spec.startup_timeout_s))
        self._sights: dict[str, Sight] = {}
        self._reported: dict[str, tuple[str, str]] = {}
        self._doings = Doings(host.log, self._tell_doing)
        self._router: ChildProcess | None = None
        self._worker_bind = ""
        self._taken_ports: tuple[int, ...] = ()
        self._folder: Path | None = None
        self._session: aiohttp.ClientSession | None = None
        self._started_at = 0.0
        self._in_a_hurry = False
        self._is_up = False
        self._named_a_log = False
        """An error tells where a log is: its reader will look there."""
        self._acting = asyncio.Lock()

    @property
    def log_dir(self) -> Path:
        """Where the router's log is, and the members' where they share this machine's files."""
        assert self._folder is not None
        return self.spec.log_dir or self._folder

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
                raise StartupError(f"not ready after {self.spec.startup_timeout_s:g} s: {late}{self._see_logs()}")
            await asyncio.sleep(_PERIOD_S)
        self._is_up = True

    def _start_router(self) -> None:
        spec = self.spec
        self._folder = Path(tempfile.mkdtemp(prefix="flowprefill-logs-"))
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            (self.log_dir / "router.log").open("ab").close()
        except OSError as error:
            raise StartupError(f"cannot write logs to {self.log_dir}: {error.strerror}") from error
        ports = free_ports(2)
        port = spec.port or ports[0]
        self._taken_ports = (port, ports[1])
        self._worker_bind = f"tcp://{self._address}:{ports[1]}"
        self.url = local_url(spec.host, port)
        key = ["--api-key", spec.api_key] if spec.api_key else []
        listen = ["--host", spec.host, "--port", str(port), "--worker-bind", self._worker_bind]
        arguments = ["router", *listen, *key, *spec.router_arguments]
        self._router = ChildProcess("router", arguments, self.log_dir / "router.log", {"PYTHONUNBUFFERED": "1"})
        self._report("router", "starting", f"pid {self._router.pid}")

    async def watch(self) -> None:
        """Keep the pool at its size until cancelled. Raises PeerFault when the router is gone, or a member of a pool
        that replaces none."""
        while True:
            await self._round()
            await asyncio.sleep(_PERIOD_S)

    async def _round(self) -> None:
        assert self._router is not None
        status = self._router.exit_status
        if status is not None:
            if status == WRONG_USE and not self._is_up:
                raise BadInput(f"router does not take these flags: {self._router.last_words()}")
            words = f"the router {self._router.how_it_ended()}{self._see_log(self._router.log)}"
            raise PeerFault(words) if self._is_up else StartupError(words)
        workers = await self._ask_router("GET")
        if workers is not None:
            self._report("router", "ready", self.url)
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
                sight = self._sights.pop(name, Sight())
                if member is not None and not (self._is_up and self._replaces):
                    raise self._fault(member, sight)
                self._report(name, member.state if member else "stopped", self._detail(member) if member else "")
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
            log_dir=str(self.log_dir) if self.spec.log_dir or self._host.shares_files else None,
            threads=self.spec.threads,
            servers=sum(self._supervisor.desired.values()),
            taken_ports=self._taken_ports,
        )

    def _fault(self, member: Member, sight: Sight) -> FlowPrefillError:
        if sight.wrong_use:
            return BadInput(f"{member.name} does not take these flags: {member.last_failure}")
        log = Path(sight.log) if self._host.shares_files and sight.log else None
        words = f"{member.name} {member.last_failure}{self._see_log(log)}"
        return PeerFault(words) if self._is_up else StartupError(words)

    def _see_log(self, log: Path | None) -> str:
        self._named_a_log = self._named_a_log or log is not None
        return f"; its log is {log}" if log is not None else ""

    def _see_logs(self) -> str:
        self._named_a_log = self._named_a_log or self._host.shares_files
        return f"; logs are in {self.log_dir}" if self._host.shares_files else ""

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
                    "gpus": sight.gpus,
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
        """End the router, which drains, then all members. ``keep_logs``: leave the temporary folder of a pool that has
        served, or whose error names a log."""
        self._doings.close()
        if self._router is not None:
            await asyncio.to_thread(end, [self._router], _ROUTER_GRACES_S, lambda: self._in_a_hurry)
        if self._session is not None:
            await self._session.close()
        await self._host.end_all()
        has_logs = self.spec.log_dir is None and (self._is_up or self._named_a_log)
        if self._folder is not None and not (keep_logs and has_logs):
            shutil.rmtree(self._folder, ignore_errors=True)

    def hurry(self) -> None:
        """Cut a ``stop`` short that is under way, or to come."""
        self._in_a_hurry = True
        self._host.hurry()

    async def _ask_router(self, method: str, document: dict[str, str] | None = None) -> Any:  # its JSON, or None
        assert self._session is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.request(method, f"{self.url}/workers", json=document) as response:
                return await response.json()
        return None

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.spec.api_key}"} if self.spec.api_key else {}

    def _detail(self, member: Member) -> str:
        sight = self._sights.get(member.name, Sight())
        where = f" node {sight.node[:8]}" if sight.node else ""
        where += f" GPU {sight.gpus}" if sight.gpus else ""
        match member.state:
            case MemberState.STARTING:
                return member.reason
            case MemberState.LOADING:
                return f"pid {sight.pid}{where}"
            case MemberState.BACKING_OFF:
                return in_one_line(member.last_failure)
        return f"{sight.url} pid {sight.pid}{where}"

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
