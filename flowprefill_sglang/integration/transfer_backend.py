"""Makes ``--disaggregation-transfer-backend zmq`` known to SGLang 0.5.23.

SGLang lets a plugin add the flag's value, but constructs a closed Enum from it and maps that to classes in one
function, which several of its modules import by name (``disaggregation.prefill``, ``disaggregation.decode``,
``managers.disagg_service``). ``HookRegistry`` rebinds such copies in all modules loaded by then; modules loaded later
import the hooked function. ``check`` looks at both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import Hook, HookKind, sglang_version

NAME: Final = "zmq"
MEMBER: Final = "ZMQ"
_TARGET: Final = "sglang.srt.disaggregation.utils.get_kv_class"


def prepare() -> None:
    """Add the flag's value and the Enum's member; doing it again changes nothing. Raises StartupError."""
    try:
        from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES, add_disagg_transfer_backend_choices
        from sglang.srt.disaggregation.utils import TransferBackend
    except ImportError as error:
        raise _unfit(f"{error}") from error
    if NAME not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([NAME])
    if MEMBER not in TransferBackend.__members__:
        add_member(TransferBackend, MEMBER, NAME)


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers."""
    return [
        Hook(
            target=_TARGET,
            kind=HookKind.AROUND,
            function=get_kv_class,
            why="--disaggregation-transfer-backend zmq has no classes to run",
        )
    ]


def get_kv_class(original: Callable[..., Any], transfer_backend: Enum, class_type: Enum) -> Any:  # a class, or None
    """Around SGLang's ``get_kv_class``: our classes for our backend, SGLang's for every other."""
    if transfer_backend.value != NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from flowprefill_sglang.kv import endpoints, manager

    return {
        "manager": manager.ZmqKVManager,
        "sender": endpoints.ZmqKVSender,
        "receiver": endpoints.ZmqKVReceiver,
        "bootstrap_server": endpoints.ZmqKVBootstrapServer,
    }[class_type.value]


def check() -> None:
    """Raises StartupError unless SGLang, as it is loaded now, would run our classes for the flag's value."""
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
    from sglang.srt.disaggregation import utils

    if NAME not in DISAGG_TRANSFER_BACKEND_CHOICES:
        raise _unfit("the choices of --disaggregation-transfer-backend")
    try:
        member = utils.TransferBackend(NAME)
    except ValueError as error:
        raise _unfit("disaggregation.utils.TransferBackend") from error
    for class_type in utils.KVClassType:
        try:
            found = utils.get_kv_class(member, class_type)
        except ValueError:  # what SGLang's own function says of a backend that it does not know
            found = None
        if class_type.value != "kvargs" and not getattr(found, "__module__", "").startswith("flowprefill_sglang."):
            raise _unfit(f"{_TARGET} ({class_type.value})")
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and getattr(module, "get_kv_class", utils.get_kv_class) is not utils.get_kv_class:
            raise _unfit(f"{name}.get_kv_class")


def add_member(enum: type[Enum], name: str, value: str) -> None:
    """Add a member to a plain Enum that has been defined already: by name, by value and in its iteration."""
    member = object.__new__(enum)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum  # type: ignore[attr-defined]  # as EnumType sets it
    member._sort_order_ = len(enum._member_names_)  # type: ignore[attr-defined]
    enum._member_names_.append(name)
    enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)  # before the map: EnumType guards the names in it
    enum._member_map_[name] = member


def _unfit(missing: str) -> StartupError:
    return StartupError(
        f"SGLang {sglang_version()} does not take the zmq KV transfer backend: {missing} is not as in 0.5.23; "
        f"install sglang==0.5.23"
    )
