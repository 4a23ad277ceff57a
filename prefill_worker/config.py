"""What a prefill worker is told at its start, apart from SGLang's own flags."""

from __future__ import annotations

import argparse
import os
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from flowprefill_sglang.core.policies import POLICIES
from flowprefill_sglang.flag_values import count, milliseconds, positive_seconds, seconds
from flowprefill_sglang.prefill_worker.settings import (
    ACCELERATOR_MAX_BLOCKING_MS,
    CPU_MAX_BLOCKING_MS,
    RunAheadKind,
    SchedulerKind,
    SchedulerSettings,
)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One worker's link to its router."""

    router: str
    """ZeroMQ address of the router's worker port, e.g. ``tcp://10.0.0.1:30001``."""
    name: str
    """Unique within the cluster. Default: host name and process id, which a restart changes; an orchestrator should
    give a stable one, so that a restarted worker replaces its former self at once."""
    hello_retry_s: float = 1.0
    """Pause between greetings while no router answers. A second: routers start slower than that, and a greeting is a
    hundred bytes."""
    refused_retry_s: float = 30.0
    """Pause between greetings of a router that refused this worker for its version. Half a minute: until somebody has
    upgraded it nothing changes, and after that the worker should not be missed for long."""
    leave_after_s: float = 30.0
    """Longest wait for requests in flight once the worker drains, asked by the router or by SIGTERM. Then they are
    aborted, and the router tries them elsewhere. Thirty seconds are what orchestrators give a process by default."""
    unresponsive_s: float = 60.0
    """A scheduler or detokenizer that leaves a question unanswered for so long is taken for hung, and the worker ends,
    to be started again. A minute: a scheduler answers at the next operator boundary, and no operator, nor what is
    compiled at its first use, should take so long; SGLang's own watchdog, which has no say between two batches, waits
    five."""
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    """What is prefilled when."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The worker's own flags; SGLang's are passed through."""
    parser.add_argument(
        "--router", required=True, type=_endpoint, metavar="tcp://HOST:PORT", help="the router's worker port"
    )
    parser.add_argument("--name", default=None, help="unique name of this worker (default: HOST-PID)")
    parser.add_argument(
        "--shutdown-drain-secs",
        type=seconds,
        default=WorkerConfig.leave_after_s,
        metavar="S",
        help="longest wait for requests in flight on shutdown (default: %(default)s)",
    )
    parser.add_argument(
        "--unresponsive-secs",
        type=positive_seconds,
        default=WorkerConfig.unresponsive_s,
        metavar="S",
        help="a scheduler or detokenizer that answers nothing for so long is hung: "
        "the worker ends (default: %(default)s)",
    )
    _add_scheduler_arguments(parser.add_argument_group("scheduling"))


def _add_scheduler_arguments(group: argparse._ArgumentGroup) -> None:
    defaults = SchedulerSettings()
    group.add_argument(
        "--prefill-scheduler",
        type=SchedulerKind,
        choices=list(SchedulerKind),
        default=defaults.kind,
        help="preemptive and deadline-aware, or SGLang's own for comparison (default: %(default)s)",
    )
    group.add_argument(
        "--scheduler-policy",
        choices=sorted(POLICIES),
        default=defaults.policy,
        help="which request or task runs next (default: %(default)s)",
    )
    group.add_argument(
        "--max-wait-secs",
        type=positive_seconds,
        default=defaults.max_wait_s,
        metavar="S",
        help="a request that has waited this long, or past a longer objective, has a share of the device "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-suspend-secs",
        type=positive_seconds,
        default=defaults.max_suspend_s,
        metavar="S",
        help="the same for a task suspended this long (default: %(default)s)",
    )
    group.add_argument(
        "--batch-tokens",
        type=count,
        default=defaults.batch_tokens,
        metavar="N",
        help="most new tokens of a batch of several requests (default: %(default)s)",
    )
    group.add_argument(
        "--max-blocking-ms",
        type=milliseconds,
        default=defaults.max_blocking_ms,
        metavar="MS",
        help="an operator expected to take longer runs in slices; 0: none does "
        f"(default: {ACCELERATOR_MAX_BLOCKING_MS:g} on an accelerator, {CPU_MAX_BLOCKING_MS:g} on a CPU)",
    )
    group.add_argument(
        "--run-ahead",
        type=RunAheadKind,
        choices=list(RunAheadKind),
        default=defaults.run_ahead,
        help="how far a GPU may be behind; all but the default are for comparison (default: %(default)s)",
    )
    group.add_argument(
        "--cost-file",
        default=defaults.cost_file,
        metavar="FILE",
        help="cost model made by `flowprefill profile` (default: the one kept for this model and hardware, or else a "
        "short calibration at start-up)",
    )


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_endpoint = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port that is no number
        is_endpoint = False
    if not is_endpoint:
        raise argparse.ArgumentTypeError(f"expected tcp://HOST:PORT, the router's --worker-bind, got {text}")
    return text


def from_arguments(namespace: argparse.Namespace) -> WorkerConfig:
    """The configuration that the parsed flags describe."""
    name = namespace.name or f"{socket.gethostname()}-{os.getpid()}"
    scheduler = SchedulerSettings(
        kind=namespace.prefill_scheduler,
        policy=namespace.scheduler_policy,
        max_wait_s=namespace.max_wait_secs,
        max_suspend_s=namespace.max_suspend_secs,
        batch_tokens=namespace.batch_tokens,
        max_blocking_ms=namespace.max_blocking_ms,
        run_ahead=namespace.run_ahead,
        cost_file=namespace.cost_file,
    )
    return WorkerConfig(
        router=namespace.router,
        name=name,
        leave_after_s=namespace.shutdown_drain_secs,
        unresponsive_s=namespace.unresponsive_secs,
        scheduler=scheduler,
    )
