"""How a prefill worker schedules: set once at its start, in SGLang's HTTP process, and read in its scheduler process.

The two are different processes that SGLang starts, so the settings travel in an environment variable.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from enum import StrEnum
from typing import Final

import msgspec

from flowprefill_sglang.errors import StartupError

ENVIRONMENT_VARIABLE = "FLOWPREFILL_SCHEDULER"


ACCELERATOR_MAX_BLOCKING_MS: Final = 2.0
"""Small beside the shortest objectives in use (250 ms), large beside a launch (some microseconds)."""
CPU_MAX_BLOCKING_MS: Final = 0.0
"""Off: slices cost a fifth of the throughput there (docs/preemption.md)."""


class SchedulerKind(StrEnum):
    """Whose scheduler decides what is prefilled next."""

    FLOWPREFILL = "flowprefill"
    """Preemption at operator boundaries, decisions on events."""
    STOCK = "stock"
    """SGLang's own event loop, for comparison."""


class RunAheadKind(StrEnum):
    """How far a GPU may be behind the scheduler that feeds it. Nothing on a CPU."""

    BUDGET = "budget"
    """Up to half of ``max_blocking_ms``."""
    SYNCHRONISE = "synchronise"
    """Not at all: the device is waited for at every boundary, as the paper's implementation does. For comparison."""
    UNBOUNDED = "unbounded"
    """As far as it comes, so that a boundary stops nothing that was launched. For comparison."""


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the scheduler process needs to know beside SGLang's own flags."""

    kind: SchedulerKind = SchedulerKind.FLOWPREFILL
    policy: str = "feasible"
    """A name in ``core.policies.POLICIES``."""
    default_objective_s: float = 60.0
    """TTFT objective of requests that come without one, i.e. past the router. A minute: the aging rule's own bound."""
    max_wait_s: float = 60.0
    """From then on, or from its objective if that is longer, a request that waits has a share of the device (aging
    rule)."""
    max_suspend_s: float = 30.0
    """The same for a task suspended this long: it holds memory that others wait for."""
    batch_tokens: int = 2048
    """Most new tokens of a batch of several requests. 2,048: in simulation more delays the head for little gain."""
    slack_fraction: float = 0.1
    """The paper's alpha: others join the head of a batch while it keeps this share of its objective as slack."""
    max_blocking_ms: float | None = None
    """How long a running forward pass may keep the device once it should stop: an operator that is expected to take
    longer runs in slices, and a GPU is at most half of it behind. 0: no slices. None: the default of the device,
    ``ACCELERATOR_MAX_BLOCKING_MS`` or ``CPU_MAX_BLOCKING_MS``."""
    max_tasks: int = 64
    """Most tasks begun and not ended. Each holds activations and a slot of the attention backend."""
    activation_fraction: float = 0.5
    """Share of the memory that is free after start-up which suspended tasks' activations may take."""
    run_ahead: RunAheadKind = RunAheadKind.BUDGET
    cost_file: str | None = None
    """Cost model made by ``flowprefill profile``; None: the one kept for this model and hardware, or else a short
    calibration at start-up."""

    def blocking_target_s(self, device: str) -> float:
        """Seconds that a device of this type may be busy with what should stop; the default where nothing is sliced."""
        default_ms = CPU_MAX_BLOCKING_MS if device == "cpu" else ACCELERATOR_MAX_BLOCKING_MS
        return (self.max_blocking_ms or default_ms) / 1000

    def slice_target_s(self, device: str) -> float:
        """Seconds after which an operator should reach a boundary; 0: no operator is sliced. On an accelerator half of
        the target: the other half is for what was launched before (``run_ahead``)."""
        if self.max_blocking_ms == 0:
            return 0.0
        return self.blocking_target_s(device) / (1 if device == "cpu" else 2)

    def check(self) -> None:
        """Raise StartupError for values that cannot work."""
        problems = {
            "max_wait_s and max_suspend_s must be positive": not (self.max_wait_s > 0 and self.max_suspend_s > 0),
            "default_objective_s must be positive": not self.default_objective_s > 0,
            "batch_tokens must be at least 1": self.batch_tokens < 1,
            "slack_fraction must be at least 0 and below 1": not 0 <= self.slack_fraction < 1,
            "max_blocking_ms must not be negative": self.max_blocking_ms is not None and not self.max_blocking_ms >= 0,
            "max_tasks must be at least 1": self.max_tasks < 1,
            "activation_fraction must be above 0 and at most 1": not 0 < self.activation_fraction <= 1,
        }
        for problem, applies in problems.items():
            if applies:
                raise StartupError(f"scheduler settings: {problem}")


def publish(settings: SchedulerSettings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Hand the settings to the processes that will be started from here."""
    environment[ENVIRONMENT_VARIABLE] = msgspec.json.encode(settings).decode()


def published(environment: MutableMapping[str, str] = os.environ) -> SchedulerSettings | None:
    """The settings that the parent process published; None in a process that no prefill worker started.

    Raises StartupError when they are not what this version understands.
    """
    text = environment.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text.encode(), type=SchedulerSettings)
    except msgspec.DecodeError as error:
        raise StartupError(f"{ENVIRONMENT_VARIABLE} is not what this version understands: {error}") from error
