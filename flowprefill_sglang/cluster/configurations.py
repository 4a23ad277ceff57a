"""Ways to schedule prefills that can be measured beside each other: ours, and every one that stock SGLang offers."""

from __future__ import annotations

from dataclasses import dataclass

from flowprefill_sglang.cluster.process import FLOWPREFILL


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way to schedule prefills."""

    name: str
    flags: tuple[str, ...]
    """Of the prefill worker."""
    program: tuple[str, ...] = FLOWPREFILL
    """Python's arguments that stand for the ``flowprefill`` command in starting the worker."""
    sends_priority: bool = False
    """Whether requests to it carry SGLang's ``priority``."""

    @property
    def is_stock(self) -> bool:
        """Whether SGLang's own scheduler runs."""
        return "stock" in self.flags


def flowprefill(policy: str = "feasible", *flags: str, name: str = "flowprefill") -> Configuration:
    """Ours, with a policy."""
    return Configuration(name=name, flags=("--scheduler-policy", policy, *flags))


def stock(name: str, *flags: str) -> Configuration:
    """SGLang's own scheduler, with its own flags."""
    return Configuration(name=name, flags=("--prefill-scheduler", "stock", *flags))


STOCK_UNCHUNKED = stock("fcfs", "--schedule-policy", "fcfs", "--chunked-prefill-size", "-1")


def stock_chunked(tokens: int) -> Configuration:
    """First come, first served, in chunks."""
    return stock(f"fcfs-{tokens}", "--schedule-policy", "fcfs", "--chunked-prefill-size", str(tokens))


STOCK_PRIORITY = Configuration(
    name="priority",
    flags=("--prefill-scheduler", "stock", "--enable-priority-scheduling"),
    sends_priority=True,
)
"""Waiting requests by priority, then first come, first served; running prefills are not interrupted."""

SUITE: tuple[Configuration, ...] = (
    flowprefill("feasible", name="flowprefill"),
    STOCK_UNCHUNKED,
    stock_chunked(8192),
    stock_chunked(2048),
    stock_chunked(512),
    # The others in chunks of SGLang's own choice for this platform.
    stock("shortest-prefill-first", "--schedule-policy", "shortest-prefill-first"),
    stock("hrrn", "--schedule-policy", "hrrn"),
    STOCK_PRIORITY,
)
"""What ``flowprefill bench suite`` measures, unless told otherwise."""
OPTIONAL: tuple[Configuration, ...] = (flowprefill("sedf", name="flowprefill-sedf"),)
"""What it measures when asked by name."""
