"""What a scheduling policy chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Standing(Enum):
    """How far a candidate has come."""

    WAITING = auto()
    """Nothing of it has been computed. Starting it needs memory."""
    HALF_PREFILLED = auto()
    """Some chunks of its prompt are done and it is between two chunks: it holds KV and no activations."""
    SUSPENDED = auto()
    """A task stopped at a boundary: it holds KV and activations, and going on needs nothing new."""
    RUNNING = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Candidate:
    """One request, or one task of several, that could run next. Owned and updated by the scheduler's state machine;
    policies only read it. Times are seconds of one monotonic clock."""

    key: int
    """Unique among the candidates, growing with arrival: the last tie-breaker."""
    arrived_at: float
    """When the router received it; of a task, its oldest request."""
    deadline_at: float
    """When its first token is due; of a task, the earliest of its requests. May be infinite."""
    remaining_s: float
    """Predicted time on the device until its first token, for all of its remaining chunks."""
    promises: int = 1
    """Requests that it stands for: 1, or of a task all that its batch has."""
    set_aside: float = 0.0
    """Share of the time until its deadline that shorter ones to come will need (``core.forecast``), in [0, 1]."""
    priority: int = 0
    """The client's; higher first among equals."""
    standing: Standing = Standing.WAITING
    suspended_at: float | None = None
    """Since when it has been suspended, if it is."""
    is_promoted: bool = False
    """Whether it goes before all that are not, by the rule of ``core.aging``. It stays so until the candidate has
    ended; a task's is set if that of one of its requests is."""

    @property
    def objective_s(self) -> float:
        """The TTFT it was promised."""
        return self.deadline_at - self.arrived_at

    def slack_s(self, now: float) -> float:
        """How long it may still wait and be on time; negative when it cannot be."""
        return self.deadline_at - now - self.remaining_s

    def order(self) -> tuple[float, int, float, int]:
        """Sort key of deadline order: earliest deadline, higher priority, earlier arrival."""
        return (self.deadline_at, -self.priority, self.arrived_at, self.key)
