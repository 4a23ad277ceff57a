"""Hooks into SGLang that either all landed or stop the process.

SGLang 0.5.23's plugin loader logs a hook that it could not register or apply and goes on, so a worker would serve with
half of FlowPrefill missing. Here every hook is listed with the reason for it, registered through SGLang's own
``HookRegistry`` (so that other plugins' hooks on the same targets compose with ours), and looked for in the patched
target afterwards. What is missing ends the process with a message that names SGLang's version and the target.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from flowprefill_sglang.errors import StartupError

SUPPORTED_SGLANG = "0.5.23"


class HookKind(StrEnum):
    """How a hook sits on its target; the words are those of SGLang's ``HookType``."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One change to SGLang.

    ``target`` is the dotted name of a function, method or class; ``function`` has the signature that SGLang's
    ``HookRegistry.register`` documents for ``kind``; ``why`` completes "without this, …" for the error message.
    """

    target: str
    kind: HookKind
    function: Callable[..., Any]  # whatever the target's signature asks for
    why: str


def register(hooks: Sequence[Hook]) -> None:
    """Hand the hooks to SGLang's registry, which applies them once all plugins have been loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind.value))


def missing(hooks: Sequence[Hook]) -> list[Hook]:
    """Those of ``hooks`` that are not in place now."""
    return [hook for hook in hooks if not _is_in_place(hook)]


def verify(hooks: Sequence[Hook]) -> None:
    """Raise StartupError when any hook is not in place."""
    absent = missing(hooks)
    if absent:
        details = "\n".join(f"  {hook.target}: without this hook, {hook.why}" for hook in absent)
        raise StartupError(
            f"SGLang {sglang_version()} does not have what FlowPrefill changes in it "
            f"(made for {SUPPORTED_SGLANG}). Not applied:\n{details}"
        )


def verify_when_applied(hooks: Sequence[Hook], also: Sequence[Callable[[], None]] = ()) -> None:
    """Verify as soon as SGLang has applied the hooks of all plugins, in whichever process that is.

    ``load_plugins`` calls ``HookRegistry.apply_hooks`` last and outside of its own error handling: the one place where
    a failure can be seen at once. Each of ``also`` is called then too, and may raise StartupError.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    apply_hooks = HookRegistry.apply_hooks

    def apply_and_verify() -> None:
        apply_hooks()
        try:
            verify(hooks)
            for check in also:
                check()
        except StartupError as error:
            stop(error)

    HookRegistry.apply_hooks = apply_and_verify


def stop(error: Exception) -> NoReturn:
    """End this process: SGLang's loader catches every ``Exception`` of a plugin, but not ``SystemExit``."""
    print(f"flowprefill: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def sglang_version() -> str:
    """SGLang's installed version, or a word that says that there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _is_in_place(hook: Hook) -> bool:
    owner_name, _, attribute = hook.target.rpartition(".")
    try:
        found = inspect.getattr_static(pkgutil.resolve_name(owner_name), attribute)
    except (ImportError, AttributeError, ValueError):
        return False
    return any(hook.function is function for function in _layers(found))


def _layers(found: Any) -> Iterator[Any]:  # any attribute of any upstream object
    """The object and, below it, every hook and original that SGLang's wrappers hold on to."""
    while found is not None:
        found = getattr(found, "__func__", found)  # classmethod, staticmethod
        yield found
        for cell in getattr(found, "__closure__", None) or ():
            yield cell.cell_contents
        found = getattr(found, "__wrapped__", None)
