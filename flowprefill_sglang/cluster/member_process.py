"""A member's process with its ports, its folder and its log, on the machine where it runs: what every host starts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from flowprefill_sglang.cluster.cleaner import Cleaner
from flowprefill_sglang.cluster.gpus import VARIABLE
from flowprefill_sglang.cluster.members import Order
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.cluster.process import WRONG_USE, ChildProcess, end, server_environment
from flowprefill_sglang.errors import StartupError


class MemberProcess:
    """Runs from the moment it is made. The kernel ends it with the thread that makes it."""

    def __init__(
        self,
        order: Order,
        address: str,
        threads: int | None,
        taken_ports: Collection[int] = (),
        gpus: Sequence[str] = (),
    ) -> None:
        """Start it, to listen on ``address``. ``threads``: None leaves them as they are here. ``gpus``: the only
        ones that it sees; with none it sees what this process does.

        Raises StartupError without a model or free ports, and OSError when its folders cannot be written.
        """
        if not (Path(order.model_path) / "config.json").is_file():
            raise StartupError(f"no model at {order.model_path}: it has no config.json there")
        self.ports = free_ports(2, taken_ports)
        self.gpus = ",".join(gpus)
        self.folder = tempfile.mkdtemp(prefix="flowprefill-member-")
        """Of its temporary files, and of its log when the order says nothing."""
        try:
            self.child = self._start(order, address, threads)
            try:
                self.cleaner = Cleaner(self.child.pid, self.folder)
            except BaseException:
                self.child.kill()
                raise
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.url = f"http://{address}:{self.ports[0]}"

    def _start(self, order: Order, address: str, threads: int | None) -> ChildProcess:
        log_dir = Path(order.log_dir or self.folder)
        log_dir.mkdir(parents=True, exist_ok=True)
        http, bootstrap = map(str, self.ports)
        flags = [*order.arguments, "--host", address, "--port", http]
        if order.kind == "prefill":
            flags += ["--name", order.name, "--disaggregation-bootstrap-port", bootstrap]
        log, environment = log_dir / f"{order.name}.log", server_environment(self.folder, threads)
        if self.gpus:
            environment[VARIABLE] = self.gpus
        return ChildProcess(order.name, [order.kind, *flags], log, environment, order.program)

    def ended(self) -> tuple[str, bool] | None:
        """How it ended, and whether because it does not take its flags; None while it runs."""
        self.cleaner.reap()
        status = self.child.exit_status
        if status is None:
            return None
        return self.child.how_it_ended(), status == WRONG_USE


def end_members(
    processes: Sequence[MemberProcess], graces_s: Sequence[float], is_hurried: Callable[[], bool] = lambda: False
) -> None:
    """As ``process.end``; their folders are removed, and what those that ended before had in shared memory."""
    end([process.child for process in processes], graces_s, is_hurried)
    for process in processes:
        process.cleaner.begin_to_finish()
    for process in processes:
        process.cleaner.finish()
