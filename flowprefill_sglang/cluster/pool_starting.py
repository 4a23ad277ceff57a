"""A pool with its control port, here or on Ray, put together for whoever starts one: ``up``, the demo, programs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from flowprefill_sglang.cluster.control import Control
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.local_pool import ADDRESS, LocalHost
from flowprefill_sglang.cluster.members import Host, resource_of
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
    spec: ClusterSpec, on_progress: Callable[[LaunchEvent], None] | None = None, *, replaces: bool = True
) -> RunningPool:
    """A pool whose members are processes of this machine. ``replaces``: as ``Pool``'s.

    Raises StartupError when the router's port is taken, or there is no model or no room.
    """
    if not (spec.model_path / "config.json").is_file():
        raise StartupError(f"no model at {spec.model_path}: it has no config.json")
    require_free(spec.host, spec.port)
    host = LocalHost()
    host.require_room({"prefill": spec.prefill, "decode": spec.decode})
    return RunningPool(spec, host, ADDRESS, on_progress, replaces=replaces)


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
