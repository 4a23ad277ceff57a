"""A pool with its control port, here or on Ray, put together for whoever starts one: ``up``, the demo, programs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from flowprefill_sglang.cluster.control import Control
from flowprefill_sglang.cluster.gpus import VARIABLE, count_gpus, visible_gpus
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.local_pool import ADDRESS, LocalHost
from flowprefill_sglang.cluster.members import Host, device_of, resource_of
from flowprefill_sglang.cluster.pool import Pool
from flowprefill_sglang.cluster.ports import require_free
from flowprefill_sglang.cluster.supervision import KINDS
from flowprefill_sglang.errors import StartupError


class RunningPool(Pool):
    """A pool that is controlled at ``control`` once it has started."""

    def __init__(
        self,
        spec: ClusterSpec,
        host: Host,
        address: str,
        on_progress: Callable[[LaunchEvent], None] | None,
        *,
        replaces: bool = True,
    ) -> None:
        super().__init__(spec, host, address, on_progress, replaces=replaces)
        self._control = Control(self)

    @property
    def control(self) -> str:
        """The control port's URL."""
        return self._control.url

    async def start(self) -> None:
        """As ``Pool.start``. The control port is open meanwhile."""
        await self._control.start()
        await super().start()

    async def stop(self, *, keep_logs: bool = False) -> None:
        """As ``Pool.stop``."""
        await self._control.stop()
        await super().stop(keep_logs=keep_logs)


def pool_here(
    spec: ClusterSpec,
    on_progress: Callable[[LaunchEvent], None] | None = None,
    *,
    replaces: bool = True,
    count: Callable[[], int] = count_gpus,
) -> RunningPool:
    """A pool whose members are processes of this machine. ``replaces``: as ``Pool``'s. ``count``: of the GPUs here.

    Raises StartupError when the router's port is taken, or there is no model or no room, and BadInput for flags that do
    not go with GPUs of a member's own.
    """
    if not (spec.model_path / "config.json").is_file():
        raise StartupError(f"no model at {spec.model_path}: it has no config.json")
    require_free(spec.host, spec.port)
    host = _host_here(spec, count)
    host.require_room({"prefill": spec.prefill, "decode": spec.decode})
    return RunningPool(spec, host, ADDRESS, on_progress, replaces=replaces)


def _host_here(spec: ClusterSpec, count: Callable[[], int]) -> LocalHost:
    """With GPUs to divide, unless members compute on CPUs, or share."""
    if spec.share_gpus:
        return LocalHost()
    needs = {kind: resource_of(spec, kind) for kind in KINDS}
    each: dict[str, int] = {kind: amount for kind, (resource, amount) in needs.items() if resource == "GPU"}
    gpus = visible_gpus(os.environ.get(VARIABLE), count) if each else ()
    if not gpus and not any(device_of(spec, kind) == "cuda" for kind in KINDS):
        return LocalHost()  # SGLang takes the CPU
    return LocalHost(gpus, each)


def pool_on_ray(spec: ClusterSpec, address: str | None, on_progress: Callable[[LaunchEvent], None]) -> RunningPool:
    """A pool on the Ray cluster at ``address``, or on one that is started here; ``stop`` leaves Ray in any case.

    Raises StartupError when the router's port is taken, or Ray is not installed, does not answer, or has no room.
    """
    if importlib.util.find_spec("ray") is None:
        raise StartupError("--launcher ray needs Ray: pip install 'flowprefill-sglang[ray]'")
    from flowprefill_sglang.cluster.ray_pool import connect, disconnect

    require_free(spec.host, spec.port)
    host = connect(address)
    try:
        host.needs = {kind: resource_of(spec, kind) for kind in KINDS}
        host.require_room({"prefill": spec.prefill, "decode": spec.decode})
    except BaseException:
        disconnect(host)
        raise
    return RunningPool(spec, host, host.address, on_progress)
