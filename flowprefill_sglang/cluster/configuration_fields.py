"""Every field of the cluster's YAML file: its type, what is accepted, its default, its unit and why.

The table is the file's only definition: the msgspec structs that check a file, ``flowprefill config show`` and the
test of docs/configuration.md are made from it. Defaults are those of the processes' own flags and are not stated anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from msgspec import Meta, Struct, defstruct

from flowprefill_sglang.cluster.configuration_reasons import ROUTER_REASONS
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.core.policies import POLICIES
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.settings import (
    ACCELERATOR_MAX_BLOCKING_MS,
    CPU_MAX_BLOCKING_MS,
    RunAheadKind,
    SchedulerKind,
    SchedulerSettings,
)
from flowprefill_sglang.router.config import LEAST, RouterConfig
from flowprefill_sglang.router.objectives import LARGEST_SLO_MS, LEAST_SLO_MS

_LARGEST_PORT: Final = 65_535
SET_BY_THE_LAUNCHER: Final = frozenset({"decode", "worker_bind", "slo_class"})
"""Fields of ``RouterConfig`` that the file does not have: addresses, and classes, which it has as ``slo_classes``."""


@dataclass(frozen=True)
class Kind:
    """What a field accepts: for msgspec, and in words."""

    type: Any  # a type expression made at run time
    expected: str


def _whole(least: int, most: int | None = None) -> Kind:
    words = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Kind(Annotated[int, Meta(ge=least, le=most)], f"a whole number {words}")


def _seconds(least: float | None = None, *, above: float | None = None) -> Kind:
    words = f"above {above:g}" if least is None else f"of at least {least:g}"
    bound = Meta(gt=above) if least is None else Meta(ge=least)
    return Kind(Annotated[float, bound], f"a number of seconds {words}")


def _choice(names: list[str]) -> Kind:
    return Kind(Annotated[str, Meta(pattern=f"^(?:{'|'.join(names)})$")], f"one of {', '.join(names)}")


def _or_null(kind: Kind) -> Kind:
    return Kind(kind.type | None, f"{kind.expected}, or null")


_TEXT: Final = Kind(Annotated[str, Meta(min_length=1)], "text")
_MILLISECONDS: Final = Kind(Annotated[float, Meta(ge=0)], "a number of milliseconds of at least 0")
_SWITCH: Final = Kind(bool, "true or false")
_PORT: Final = _whole(0, _LARGEST_PORT)
_CLASSES: Final = Kind(
    dict[str, Any], f"a mapping of class names to milliseconds from {LEAST_SLO_MS:g} to {LARGEST_SLO_MS:.0f}"
)
_SGLANG: Final = Kind(dict[str, Any], "a mapping of SGLang's flags, without dashes in front, to their values")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a section."""

    name: str
    kind: Kind
    default: Any  # of the kind's type
    text: str
    """What it is, with its unit."""
    why: str
    """Why the default is what it is."""
    flag: str | None = None
    """The flag of the section's process that takes it; None where the launcher does."""
    example: str = ""
    """A value in YAML, where the default shows none."""


def _router_field(item: dataclasses.Field[Any]) -> Field:
    name, default = item.name, item.default
    if name in ("port", "prometheus_port"):
        kind = _PORT
    elif "choices" in item.metadata:
        kind = _choice(list(item.metadata["choices"]))
    elif isinstance(default, bool):
        kind = _SWITCH
    elif isinstance(default, int):
        kind = _whole(int(LEAST[name]))
    elif isinstance(default, float):
        kind = _seconds(LEAST.get(name, 0))
    else:
        kind = _TEXT
    return Field(
        name=name,
        kind=_or_null(kind) if default is None else kind,
        default=default,
        text=item.metadata["help"],
        why=ROUTER_REASONS[name],
        flag="--" + name.replace("_", "-"),
    )


def _sglang_field(whose: str, example: str) -> Field:
    return Field(
        name="sglang",
        kind=_SGLANG,
        default={},
        text=f"SGLang flags of {whose}, passed on unchanged; true is a flag without a value, a list gives several",
        why="SGLang chooses for itself; 'sglang serve --help' lists its flags",
        example=example,
    )


_SCHEDULER: Final = SchedulerSettings()

SECTIONS: Final[Mapping[str, tuple[Field, ...]]] = {
    "model": (
        Field(
            name="path",
            kind=_or_null(_TEXT),
            default=None,
            text="folder of the model, as every machine sees it; a relative one starts at this file's folder",
            why="a tiny random-weight model is made, so that a first try needs no download",
            example="/models/Llama-3-8B",
        ),
    ),
    "router": (
        *(_router_field(item) for item in dataclasses.fields(RouterConfig) if item.name not in SET_BY_THE_LAUNCHER),
        Field(
            name="slo_classes",
            kind=_CLASSES,
            default={},
            text="TTFT objectives in milliseconds by class of request, beside or in place of the default ones",
            why="text 250, image 500, search 4000, file 6000 (the paper's, for Llama-3-8B on a GPU), standard 6000",
            example="{chat: 300, batch: 60000}",
        ),
    ),
    "prefill": (
        Field(
            name="count",
            kind=_whole(1),
            default=ClusterSpec.prefill,
            text="prefill workers, one model copy each",
            why="the smallest cluster",
        ),
        Field(
            name="scheduler",
            kind=_choice([str(kind) for kind in SchedulerKind]),
            default=str(_SCHEDULER.kind),
            text="preemptive and deadline-aware, or SGLang's own for comparison",
            why="it is what this project is for",
        ),
        Field(
            name="scheduler_policy",
            kind=_choice(sorted(POLICIES)),
            default=_SCHEDULER.policy,
            text="which request or task runs next",
            why="it keeps most objectives in simulation and measurement (docs/scheduling.md)",
            flag="--scheduler-policy",
        ),
        Field(
            name="max_wait_secs",
            kind=_seconds(above=0),
            default=_SCHEDULER.max_wait_s,
            text="seconds: a request that has waited this long, or past a longer objective, has a share of the device",
            why="a minute is as long as a person waits, and more than any class's objective",
            flag="--max-wait-secs",
        ),
        Field(
            name="max_suspend_secs",
            kind=_seconds(above=0),
            default=_SCHEDULER.max_suspend_s,
            text="seconds: the same for a task suspended this long",
            why="it holds memory that others wait for",
            flag="--max-suspend-secs",
        ),
        Field(
            name="batch_tokens",
            kind=_whole(1),
            default=_SCHEDULER.batch_tokens,
            text="most new tokens of a batch of several requests",
            why="in simulation more delays the head of the batch for little gain",
            flag="--batch-tokens",
        ),
        Field(
            name="max_blocking_ms",
            kind=_or_null(_MILLISECONDS),
            default=_SCHEDULER.max_blocking_ms,
            text="milliseconds: an operator expected to take longer runs in slices, and a GPU is at most half of it "
            "behind; 0: no slices",
            why=f"{ACCELERATOR_MAX_BLOCKING_MS:g} on an accelerator, {CPU_MAX_BLOCKING_MS:g} on a CPU",
            flag="--max-blocking-ms",
            example="2",
        ),
        Field(
            name="run_ahead",
            kind=_choice([str(kind) for kind in RunAheadKind]),
            default=str(_SCHEDULER.run_ahead),
            text="how far a GPU may be behind the scheduler",
            why="all but the default are for comparison",
            flag="--run-ahead",
        ),
        Field(
            name="cost_file",
            kind=_or_null(_TEXT),
            default=_SCHEDULER.cost_file,
            text="cost model made by 'flowprefill profile'; a relative path starts at this file's folder",
            why="the one kept for this model and hardware is taken, or else a short calibration at start-up",
            flag="--cost-file",
            example="profile.json",
        ),
        Field(
            name="shutdown_drain_secs",
            kind=_seconds(0),
            default=WorkerConfig.leave_after_s,
            text="seconds that requests in flight may take on shutdown",
            why="what orchestrators give a process to end by default",
            flag="--shutdown-drain-secs",
        ),
        Field(
            name="unresponsive_secs",
            kind=_seconds(above=0),
            default=WorkerConfig.unresponsive_s,
            text="seconds: a scheduler or detokenizer that answers nothing for so long is hung, and its worker ends",
            why="schedulers answer at each operator boundary, and no operator should take a minute",
            flag="--unresponsive-secs",
        ),
        _sglang_field("the prefill workers", "{chunked-prefill-size: 8192, log-level: warning}"),
    ),
    "decode": (
        Field(
            name="count",
            kind=_whole(1),
            default=ClusterSpec.decode,
            text="decode instances, one model copy each",
            why="the smallest cluster",
        ),
        _sglang_field("the decode instances", "{mem-fraction-static: 0.85}"),
    ),
    "servers": (
        Field(
            name="threads",
            kind=_or_null(_whole(1)),
            default=ClusterSpec.threads,
            text="CPU threads of each SGLang server's scheduler; without effect on a GPU",
            why="the cores divided among the servers",
            example="4",
        ),
        _sglang_field("every prefill worker and decode instance", "{tp-size: 1, context-length: 32768}"),
    ),
    "launcher": (
        Field(
            name="kind",
            kind=_choice(["local", "ray"]),
            default="local",
            text="what starts the processes: this machine, or a Ray cluster",
            why="it needs nothing but this machine",
        ),
        Field(
            name="ray_address",
            kind=_or_null(_TEXT),
            default=None,
            text="the Ray cluster to join, as in ray.init(address=…); only with kind: ray",
            why="a Ray of its own is started",
            example="auto",
        ),
        Field(
            name="device",
            kind=_or_null(_choice(["cpu", "cuda"])),
            default=None,
            text="what every SGLang server computes on: its --device",
            why="SGLang takes the GPU that it finds, and the CPU when there is none",
            example="cpu",
        ),
        Field(
            name="share_gpus",
            kind=_SWITCH,
            default=ClusterSpec.share_gpus,
            text="with kind: local, every server sees all GPUs, and mem-fraction-static must divide their memory",
            why="a server has as many GPUs to itself as it has ranks",
        ),
        Field(
            name="startup_timeout_secs",
            kind=_seconds(above=0),
            default=ClusterSpec.startup_timeout_s,
            text="seconds until every process must be ready, or all are stopped again",
            why="large models load for minutes",
        ),
    ),
    "logs": (
        Field(
            name="dir",
            kind=_or_null(_TEXT),
            default=None,
            text="folder for one log file a process; a relative one starts at this file's folder",
            why="a temporary folder is made, and removed after a clean end",
            example="/var/log/flowprefill",
        ),
    ),
}
"""The file's sections in its order. Any of them, and any field, may be left out."""

SECTION_TEXTS: Final[Mapping[str, str]] = {
    "model": "What is served.",
    "router": "The one address that clients talk to (docs/router.md).",
    "prefill": "The workers that compute prompts (docs/preemption.md, docs/scheduling.md).",
    "decode": "Stock SGLang servers that generate tokens.",
    "servers": "What prefill workers and decode instances have in common.",
    "launcher": "How the processes are started.",
    "logs": "Where the processes write what they have to say.",
}


def fields_of(section: str) -> dict[str, Field]:
    """A section's fields by name."""
    return {field.name: field for field in SECTIONS[section]}


def _struct(name: str, fields: list[tuple[str, Any, Any]]) -> type[Struct]:
    return defstruct(name, fields, frozen=True, kw_only=True, forbid_unknown_fields=True)


ClusterFile: Final = _struct(
    "ClusterFile",
    [
        (section, made := _struct(section.capitalize(), [(f.name, f.kind.type, f.default) for f in fields]), made())
        for section, fields in SECTIONS.items()
    ],
)
"""The whole file, as msgspec checks it."""
