"""Members as Ray actors: the only module that imports Ray.

An actor holds one ``flowprefill prefill|decode`` process as its child, in a placement group of one bundle, so that all
of its tensor-parallel ranks are on one node. Ray places, notices losses and ends everything with the driver; requests
never pass through it. The actor is not restarted by Ray: the supervisor does that, with one back-off and one reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from flowprefill_sglang.cluster.member_process import MemberProcess, end_members
from flowprefill_sglang.cluster.members import Order, Sight
from flowprefill_sglang.cluster.process import tail_of
from flowprefill_sglang.errors import BadInput, FlowPrefillError, PeerFault, StartupError

_CONNECT_S: Final = 9.0
_ANSWER_S: Final = 3.0
_PLACE_POLL_S: Final = 1.0
_END_GRACES_S: Final[tuple[float, ...]] = (8.0, 3.0)
_END_S: Final = sum(_END_GRACES_S) + 5.0
_OWN_CPUS: Final = 64
"""CPUs that a Ray of our own counts: on one machine they divide nothing, and members must not wait for a count."""
_OBJECT_STORE_BYTES: Final = 80 * 2**20
"""Nothing is kept in Ray's object store but the answers of a few calls."""


def connect(address: str | None) -> RayHost:
    """Join the Ray cluster at ``address`` (``auto`` or HOST:PORT), or start one on this machine.

    Raises BadInput for an address of another form and StartupError when no Ray answers there, within ten seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        _require_ray_at(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:  # Ray 2.60 gives up with SystemExit
            raise StartupError(f"cannot join Ray at {address}: {error}") from error
        return RayHost(None)
    folder = Path(tempfile.mkdtemp(prefix="flowprefill-ray-", dir="/tmp"))  # a short path: it holds sockets
    try:
        ray.init(
            address="local",
            num_cpus=_OWN_CPUS,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            **quiet,
        )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StartupError(f"cannot start Ray on this machine: {error}") from error
    return RayHost(folder)


def disconnect(host: RayHost) -> None:
    """Leave Ray; end it, and remove its folder, where it is our own."""
    ray.shutdown()
    if host.own_folder is not None:
        shutil.rmtree(host.own_folder, ignore_errors=True)


def _require_ray_at(address: str) -> None:
    """Ray itself waits for minutes, and then ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise BadInput(f"--ray-address {address}: expected HOST:PORT of a Ray cluster's head, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        answered = subprocess.run(check, timeout=_CONNECT_S, capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise StartupError(f"no Ray at {address}: {error.strerror or error}; is its head running there?") from error
    except subprocess.TimeoutExpired:
        answered = False
    if not answered:
        raise StartupError(f"no Ray at {address}: something listens there, and does not answer as a Ray head does")


class _MemberActor:
    """Lives on the member's node. Calls run on the actor's main thread, which must be the one that starts the child:
    the kernel ends the child with that thread."""

    def __init__(self) -> None:
        self._process: MemberProcess | None = None
        with contextlib.suppress(OSError):  # Ray makes its workers nice, and not everybody may undo that
            os.setpriority(os.PRIO_PROCESS, 0, 0)

    def start(self, order: Order) -> Sight:
        """Start the process; a Sight with ``ended`` says why it could not be."""
        node = ray.get_runtime_context().get_node_id()
        ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's
        try:
            self._process = process = MemberProcess(order, ip, order.threads or 1, order.taken_ports)
        except (FlowPrefillError, OSError) as error:
            return Sight(node=node, ended=f"cannot start on node {ip}: {error}")
        gpus = ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])  # Ray shows its actor no others
        return Sight(url=process.url, pid=process.child.pid, node=node, gpus=gpus, log=str(process.child.log))

    def folder(self) -> str:
        """Where its files are."""
        return "" if self._process is None else self._process.folder

    def ended(self) -> tuple[str, bool] | None:
        """How the process ended, and whether it did not take its flags; None while it runs."""
        assert self._process is not None
        return self._process.ended()

    def terminate(self) -> None:
        """Ask the process to end when it is done."""
        assert self._process is not None
        self._process.child.terminate()

    def tail(self, lines: int) -> str:
        """The end of its log."""
        assert self._process is not None
        return self._process.child.log_tail(lines)

    def end(self, graces_s: tuple[float, ...]) -> None:
        """Interrupt once for each grace, then kill; remove the folder."""
        if self._process is not None:
            end_members([self._process], graces_s)


def _clear_away(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Entry:
    order: Order
    sight: Sight
    group: PlacementGroup | None = None
    actor: Any = None  # a Ray actor handle; its methods are made at run time
    folder: str = ""
    bringing_up: asyncio.Task[None] | None = field(default=None, repr=False)


class RayHost:
    """Members on the cluster that this process has joined."""

    shares_files = False

    def __init__(self, own_folder: Path | None) -> None:
        self.own_folder = own_folder
        """Of a Ray that ends with this host; None where the cluster was there before."""
        self._entries: dict[str, _Entry] = {}
        self._graces_s = _END_GRACES_S
        self.needs: Mapping[str, tuple[str, int]] = {}
        """What a member of each kind takes, e.g. ``("GPU", 2)``. Set before the first start."""
        self.address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's
        """The driver's, as the nodes reach it."""

    def require_room(self, counts: Mapping[str, int]) -> None:
        """Raise StartupError when the cluster cannot hold so many of each kind, even if nothing else ran on it."""
        free = [dict(node["Resources"]) for node in _alive_nodes()]
        for kind, wanted in counts.items():
            resource, amount = self.needs[kind]
            for placed in range(wanted):
                node = max(free, key=lambda one: float(one.get(resource, 0.0)), default={})
                if node.get(resource, 0.0) < amount:
                    has = ", ".join(_with_unit(one["Resources"].get(resource, 0.0), resource) for one in _alive_nodes())
                    advice = "; without GPUs, pass --device cpu" if resource == "GPU" and "0 GPU" in has else ""
                    asked = " and ".join(
                        f"{n} {k} × {_with_unit(self.needs[k][1], self.needs[k][0])}" for k, n in counts.items()
                    )
                    raise StartupError(
                        f"the Ray cluster has no room for {kind}-{placed}: asked for {asked}, each on one node; "
                        f"its nodes have: {has or 'nothing'}{advice}"
                    )
                node[resource] -= amount

    def start(self, order: Order) -> None:
        """Begin to start it."""
        entry = _Entry(order, Sight(waiting_for="a place in the Ray cluster"))
        self._entries[order.name] = entry
        entry.bringing_up = asyncio.get_running_loop().create_task(self._bring_up(entry))

    async def _bring_up(self, entry: _Entry) -> None:
        resource, amount = self.needs[entry.order.kind]
        what = _with_unit(amount, resource)
        try:
            entry.group = placement_group(
                [{resource: amount}],
                strategy="STRICT_PACK",
                name=f"flowprefill-{entry.order.name}",
                _soft_target_node_id=self._emptiest_node(entry, resource, amount),
            )
            entry.sight = replace(entry.sight, waiting_for=f"{what} on one node of the Ray cluster")
            while not await asyncio.to_thread(entry.group.wait, _PLACE_POLL_S):
                pass
            entry.sight = replace(entry.sight, waiting_for="its actor to start")
            entry.actor = (
                ray.remote(_MemberActor)
                .options(
                    num_cpus=amount if resource == "CPU" else 0,
                    num_gpus=amount if resource == "GPU" else 0,
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(entry.group, 0),
                    runtime_env=_runtime_env(),
                )
                .remote()
            )
            entry.sight = await entry.actor.start.remote(entry.order)
            entry.folder = await entry.actor.folder.remote()
        except Exception as error:  # the edge of a task; whatever it was, the supervisor tries again
            entry.sight = replace(entry.sight, ended=f"its actor could not start: {_first_line(error)}")

    def _emptiest_node(self, entry: _Entry, resource: str, amount: int) -> str | None:
        """The node where our members take the smallest share, this one included: they spread."""
        taken: dict[str, float] = {}
        for other in self._entries.values():
            taken[other.sight.node] = taken.get(other.sight.node, 0.0) + self.needs[other.order.kind][1]
        fitting = [node for node in _alive_nodes() if node["Resources"].get(resource, 0.0) >= amount]
        best = min(
            fitting,
            key=lambda node: (taken.get(node["NodeID"], 0.0) + amount) / node["Resources"][resource],
            default=None,
        )
        if best is None:
            return None
        entry.sight = replace(entry.sight, node=best["NodeID"])
        return str(best["NodeID"])

    async def look(self, name: str) -> Sight:
        """What is known of it, within a few seconds."""
        entry = self._entries.get(name)
        if entry is None:
            return Sight(waiting_for="its turn")
        if entry.bringing_up is None or not entry.bringing_up.done() or entry.sight.ended is not None:
            return entry.sight
        try:
            ended = await asyncio.wait_for(_answer(entry.actor.ended.remote()), _ANSWER_S)
        except (TimeoutError, ActorUnavailableError):
            return replace(entry.sight, answered=False)
        except ActorDiedError as error:
            return replace(entry.sight, ended=await self._last_words(entry, error))
        except RayError as error:
            return replace(entry.sight, ended=f"its actor failed: {_first_line(error)}")
        if ended is None:
            return entry.sight
        return replace(entry.sight, ended=ended[0], wrong_use=ended[1])

    async def _last_words(self, entry: _Entry, error: Exception) -> str:
        if entry.sight.node not in {node["NodeID"] for node in _alive_nodes()}:
            return f"its node {entry.sight.node[:8]} was lost"
        with contextlib.suppress(RayError, TimeoutError, OSError):
            tail = await self._on_node(entry, tail_of, Path(entry.sight.log), 1)
            return f"its actor died; the end of its log: {tail}"
        return f"its actor died: {_first_line(error)}"

    async def _on_node(self, entry: _Entry, function: Any, *arguments: Any) -> Any:  # any function, its answer
        """Run something small on the member's node."""
        where = NodeAffinitySchedulingStrategy(entry.sight.node, soft=False)
        task = ray.remote(function).options(
            num_cpus=0, max_retries=0, scheduling_strategy=where, runtime_env=_runtime_env()
        )
        return await asyncio.wait_for(_answer(task.remote(*arguments)), _END_S)

    async def ask_to_end(self, name: str) -> None:
        """SIGTERM."""
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(_answer(self._entries[name].actor.terminate.remote()), _ANSWER_S)

    async def remove(self, name: str) -> None:
        """End it now, and free its place."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            await self._remove(entry, ())

    async def _remove(self, entry: _Entry, graces_s: tuple[float, ...]) -> None:
        if entry.bringing_up is not None and not entry.bringing_up.done():
            entry.bringing_up.cancel()
            await asyncio.wait([entry.bringing_up])
        clean = entry.actor is None
        if entry.actor is not None:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(_answer(entry.actor.end.remote(graces_s)), sum(graces_s) + _ANSWER_S)
                clean = True
            await asyncio.to_thread(ray.kill, entry.actor)  # a call to Ray's head, which may be slow
        if not clean and entry.folder and entry.sight.node in {node["NodeID"] for node in _alive_nodes()}:
            with contextlib.suppress(RayError, TimeoutError):
                await self._on_node(entry, _clear_away, entry.folder)
        if entry.group is not None:
            await asyncio.to_thread(remove_placement_group, entry.group)

    async def log(self, name: str, lines: int) -> str:
        """The end of its log. Raises PeerFault."""
        entry = self._entries.get(name)
        if entry is None or entry.actor is None or not entry.sight.log:
            raise PeerFault(f"{name} has no log now: no process of it runs", status=503)
        try:
            return str(await asyncio.wait_for(_answer(entry.actor.tail.remote(lines)), _ANSWER_S))
        except (RayError, TimeoutError) as error:
            raise PeerFault(f"the log of {name} cannot be had: {_first_line(error)}") from error

    async def end_all(self) -> None:
        """All at once; then leave Ray, and end it where it is our own."""
        entries = list(self._entries.values())
        self._entries.clear()
        await asyncio.gather(*(self._remove(entry, self._graces_s) for entry in entries))
        await asyncio.to_thread(disconnect, self)

    def hurry(self) -> None:
        """Do without the first grace of an ``end_all`` to come."""
        self._graces_s = _END_GRACES_S[1:]


async def _answer(reference: Any) -> Any:  # an ObjectRef is awaitable, and no coroutine
    return await reference


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's


def _runtime_env() -> dict[str, Any]:
    """Actors run the same code as this process, where they have the same path."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}}


def _with_unit(amount: float, resource: str) -> str:
    return f"{amount:g} {resource}{'' if amount == 1 else 's'}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
