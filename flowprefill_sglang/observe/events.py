"""What happens inside a prefill worker's scheduler, as records: the source of its metrics, of the router's progress
messages and of the timeline.

Every ``at`` is a time of the worker's ``CLOCK_MONOTONIC`` in seconds, which the processes of one host share and no
others. A ``rid`` is SGLang's name for one prompt, unique in the worker.
New fields have defaults and go last, so that old recordings stay readable.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """How a request ended in the scheduler; exactly one each."""

    PREFILLED = "prefilled"
    """The prompt was computed, and its KV handed over or on its way."""
    ABORTED = "aborted"
    FAILED = "failed"


class Trigger(StrEnum):
    """What led to a scheduling round."""

    ARRIVAL = "arrival"
    COMPLETION = "completion"
    ABORT = "abort"
    KV_POOL = "kv_pool"
    """A KV handoff ended, which freed memory."""


class RequestArrived(msgspec.Struct, frozen=True, kw_only=True, tag="arrived"):
    """A request can be prefilled from now on: SGLang knows it and a decode instance is ready for its KV."""

    at: float
    rid: str
    tokens: int
    """Of the prompt, the cached prefix included."""
    slo_class: str
    received_at: float
    """When the router (or, without one, this worker) received it."""
    deadline_at: float
    dispatch_rid: str = ""
    """The link's name for the dispatch that brought it; empty when that is ``rid``, or there was none. The prompts of a
    batch share one."""


class TaskStarted(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A batch's forward pass begins."""

    at: float
    task: int
    rids: list[str]
    new_tokens: int
    cached_tokens: int
    predicted_s: float
    deadline_at: float
    """The earliest of its requests'."""
    rest_s: float = 0.0
    """Predicted time of the chunks of its prompt that will follow this pass."""


class TaskPreempted(msgspec.Struct, frozen=True, kw_only=True, tag="preempted"):
    """A running task was suspended in favour of another."""

    at: float
    task: int
    rids: list[str]
    victim_class: str
    by_class: str
    blocking_s: float
    """From the event that led to the round (an arrival, mostly) until the task had stopped."""


class TaskResumed(msgspec.Struct, frozen=True, kw_only=True, tag="resumed"):
    """A suspended task goes on."""

    at: float
    task: int
    rids: list[str]
    suspended_s: float


class TaskRetracted(msgspec.Struct, frozen=True, kw_only=True, tag="retracted"):
    """A suspended task was undone, for its memory; another will compute its requests from the start."""

    at: float
    task: int
    rids: list[str]
    executed_s: float
    """Time it ran, which is lost."""


class TaskFinished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """A task's forward pass has ended (one chunk of a chunked prompt counts as a task)."""

    at: float
    task: int
    rids: list[str]
    new_tokens: int
    executed_s: float
    """Time it ran, without the time it was suspended."""
    predicted_s: float
    preemptions: int


class RequestEnded(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """A request has its first token, or never will."""

    at: float
    rid: str
    outcome: Outcome
    slo_class: str
    first_token_s: float
    """From its receipt until the end of its prefill, whatever the outcome."""
    is_in_time: bool


class RoundDone(msgspec.Struct, frozen=True, kw_only=True, tag="round"):
    """One scheduling decision was taken."""

    at: float
    trigger: Trigger
    duration_s: float
    """Of the decision, without SGLang's making of the chosen batch."""
    waiting: int
    suspended: int
    suspended_bytes: int = 0
    promoted: int = 0
    """Requests that the aging rule promoted in this round."""


Event = (
    RequestArrived | TaskStarted | TaskPreempted | TaskResumed | TaskRetracted | TaskFinished | RequestEnded | RoundDone
)
