"""One server on its way through the shell of a pool: what it is started with, what is seen of it, and who runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.process import FLOWPREFILL
from flowprefill_sglang.cluster.supervision import Kind
from flowprefill_sglang.errors import BadInput

_LINE_LENGTH = 200
_TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")
_PP_FLAGS = ("--pp-size", "--pipeline-parallel-size")
_DP_FLAGS = ("--dp-size", "--dp", "--data-parallel-size")
_IN_TP_FLAG = "--enable-dp-attention"
"""With it, SGLang 0.5.23 counts data-parallel groups inside the tensor-parallel one."""
_PLACING_FLAGS = {"--base-gpu-id": "0", "--gpu-id-step": "1"}
"""With their defaults. They choose among all GPUs of a machine."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the host of a member starts. Its addresses are the host's business."""

    name: str
    kind: Kind
    model_path: str
    """On the machine where it will run."""
    arguments: tuple[str, ...]
    """Of ``flowprefill prefill|decode``, without addresses and ports."""
    log_dir: str | None
    """None: with its temporary files."""
    threads: int | None = None
    """CPU threads of its scheduler; None leaves them to the host."""
    servers: int = 1
    """How many members are wanted in all. They share the cores of a machine."""
    taken_ports: tuple[int, ...] = ()
    """Of the launcher's machine, given away already."""
    program: tuple[str, ...] = FLOWPREFILL
    """Python's arguments that stand for the ``flowprefill`` command."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a host sees of a process that it runs."""

    url: str = ""
    pid: int = 0
    node: str = ""
    """Which machine of several."""
    gpus: str = ""
    """Those that it has for itself, as ``CUDA_VISIBLE_DEVICES`` calls them there."""
    waiting_for: str = ""
    """Why there is no process yet."""
    ended: str | None = None
    """How it ended, and the end of its log. None while it runs or waits."""
    wrong_use: bool = False
    """It ended because it does not take its flags."""
    answered: bool = True
    """False: nobody answered for it just now; the rest is what was last known."""
    log: str = field(default="", repr=False)
    """Path of its log, on its machine."""


class Host(Protocol):
    """Runs members somewhere. Each has at most one process; a name is used again once ``remove`` has returned."""

    shares_files: bool
    """Whether the launcher and all members see the same folders."""

    def require_room(self, counts: Mapping[str, int]) -> None:
        """Raise StartupError when so many members of each kind cannot be held."""

    def start(self, order: Order) -> None:
        """Begin to start it; ``look`` says how that goes."""

    async def look(self, name: str) -> Sight:
        """Soon, whatever happens to the member."""

    async def ask_to_end(self, name: str) -> None:
        """SIGTERM: it ends when what it has in hand is done."""

    async def remove(self, name: str) -> None:
        """End it by force and clear away what it left. Never raises for one that is gone."""

    async def log(self, name: str, lines: int) -> str:
        """The end of its log. Raises PeerFault when it cannot be had."""

    async def end_all(self) -> None:
        """Interrupt all, then end by force what is left, and clear away."""

    def hurry(self) -> None:
        """Do without the first grace of ``end_all``."""


def in_one_line(failure: str) -> str:
    """How a process ended, for a list: the first line and the last one of what there is to say."""
    lines = [line if len(line) <= _LINE_LENGTH else f"{line[:_LINE_LENGTH]}…" for line in failure.splitlines()]
    return " … ".join(dict.fromkeys((*lines[:1], *lines[-1:])))


def arguments_of(spec: ClusterSpec, kind: Kind) -> tuple[str, ...]:
    """The flags of every member of this kind, without names and addresses."""
    key = ("--api-key", spec.api_key) if spec.api_key else ()
    own = spec.prefill_arguments if kind == "prefill" else spec.decode_arguments
    return ("--model-path", str(spec.model_path), *key, *spec.sglang_arguments, *own)


def resource_of(spec: ClusterSpec, kind: Kind) -> tuple[str, int]:
    """What a member takes: ``("GPU", ranks)``, or CPU cores with ``--device cpu``.

    Its ranks are tensor-parallel ones, times pipeline stages and replicas (``compute_world_size`` of SGLang 0.5.23).
    Raises BadInput for sizes that are no whole numbers, and for flags that choose among all GPUs of a machine.
    """
    arguments = arguments_of(spec, kind)
    ranks = _size(arguments, _TP_FLAGS) * _size(arguments, _PP_FLAGS)
    if _IN_TP_FLAG not in arguments:
        ranks *= _size(arguments, _DP_FLAGS)
    if device_of(spec, kind) == "cpu":
        return "CPU", ranks * (spec.threads or 1)
    for flag, default in _PLACING_FLAGS.items():
        value = _last_value(arguments, (flag,))
        if value not in (None, default):
            raise BadInput(
                f"{flag} {value}: each member has GPUs of its own, and numbers them from 0; leave the flag out, and "
                "say by CUDA_VISIBLE_DEVICES which GPUs there are for all members"
            )
    return "GPU", ranks


def device_of(spec: ClusterSpec, kind: Kind) -> str | None:
    """What members of this kind are told to compute on; None: SGLang chooses."""
    return _last_value(arguments_of(spec, kind), ("--device",))


def _size(arguments: tuple[str, ...], flags: tuple[str, ...]) -> int:
    value = _last_value(arguments, flags)
    if value is None:
        return 1
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(f"{flags[0]} {value}: expected a whole number of at least 1")
    return int(value)


def _last_value(arguments: tuple[str, ...], flags: tuple[str, ...]) -> str | None:
    """The value of whichever of these flags comes last, as ``--flag value`` or ``--flag=value``."""
    found = None
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in flags:
            found = value if equals else (arguments[position + 1] if position + 1 < len(arguments) else None)
    return found
