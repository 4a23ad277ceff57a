"""Boundaries in front of SGLang's operators, for any model, without touching a model file.

Every operator class of SGLang 0.5.23 gets its ``forward`` wrapped once, at start-up, after the model was loaded (models
bring subclasses of their own). The wrapper crosses the gate, then closes it for the operator's own run: an operator
inside of an operator, such as a linear layer inside of an expert layer or the vocabulary projection inside of the
logits processor, is no boundary. A replay of a CUDA graph is one operator. Inside of code that ``torch.compile``
traces the wrapper does nothing.

Linear, expert and attention layers that would take too long run in slices (``sliced_operators``), with a boundary
before each. So do norms, activations and rotary embeddings, which have no boundary where they are short.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from zlib import crc32

import torch
from torch.compiler import is_dynamo_compiling

from flowprefill_sglang.errors import InternalError, StartupError
from flowprefill_sglang.integration.hooks import sglang_version
from flowprefill_sglang.integration.preemption.operator_work import ELEMENTWISE_CLASSES, Kind
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
from flowprefill_sglang.prefill_worker.boundaries import Gate

OPERATORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sglang.srt.layers.radix_attention.RadixAttention", ("forward",)),
    ("sglang.srt.layers.radix_linear_attention.RadixLinearAttention", ("forward",)),
    ("sglang.srt.layers.linear.LinearBase", ("forward",)),
    ("sglang.srt.layers.linear.ColumnParallelBatchedLinear", ("forward",)),
    ("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE", ("forward", "forward_deferred_finalize")),
    # With LoRA these take the place of the layers above and call their kernels directly.
    ("sglang.srt.lora.layers.ColumnParallelLinearWithLoRA", ("forward",)),
    ("sglang.srt.lora.layers.RowParallelLinearWithLoRA", ("forward",)),
    ("sglang.srt.lora.layers.ReplicatedLinearWithLoRA", ("forward",)),
    ("sglang.srt.lora.layers.FusedMoEWithLoRA", ("forward",)),
    # The last boundary of a forward; its projection onto the vocabulary must stay whole.
    ("sglang.srt.layers.logits_processor.LogitsProcessor", ("forward",)),
    ("sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner", ("execute",)),
)
"""Classes that are wrapped, with all of their subclasses, and the methods that run them."""

SLICED: dict[str, Kind] = {
    "sglang.srt.layers.radix_attention.RadixAttention": Kind.ATTENTION,
    "sglang.srt.layers.linear.LinearBase": Kind.LINEAR,
    "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE": Kind.EXPERTS,
}
"""Which of them can be cut, by their ``forward``. Layers with LoRA cannot: their kernels read the batch's own segments
of rows."""

_MARK = "__flowprefill_gate__"
_CUT_MARK = "__flowprefill_cut__"
LAYERS = "layers"
"""Attribute under which models keep their decoder layers, a ``ModuleList``."""


def install(gate: Gate, slices: SlicedOperators | None = None) -> list[str]:
    """Wrap every operator class that is loaded now; the dotted names of those that were not wrapped before.
    ``slices`` cuts the long ones; None: each is one operator.

    Raises StartupError when SGLang lacks one of the classes. May be called again, for classes loaded since.
    """
    wrapped = []
    for name, methods in OPERATORS:
        for cls in _with_subclasses(_resolve(name)):
            for method in methods:
                function = vars(cls).get(method)
                if function is None or getattr(function, _MARK, None) is gate:
                    continue
                _refuse_another(function, _MARK, cls, method)
                kind = SLICED.get(name) if method == "forward" else None
                setattr(cls, method, _bounded(function, gate, slices=slices, kind=kind))
                wrapped.append(f"{cls.__module__}.{cls.__qualname__}.{method}")
    return wrapped


def install_cuts(gate: Gate, slices: SlicedOperators) -> list[str]:
    """Let ``slices`` cut element-wise layers, by wrapping every class of them that is loaded now: what ``install`` is
    for operators, with its result and errors. Without it they are as SGLang has them."""
    wrapped = []
    for name in ELEMENTWISE_CLASSES:
        root: Any = _resolve(name)
        inherited = root.forward  # of the root: its own, or that of SGLang's base class
        for cls in _with_subclasses(root):
            function = inherited if cls is root else vars(cls).get("forward")
            if function is None or getattr(function, _CUT_MARK, None) is gate:
                continue
            _refuse_another(function, _CUT_MARK, cls, "forward")
            setattr(cls, "forward", _cut(function, gate, slices))  # noqa: B010  to mypy a type has no such attribute
            wrapped.append(f"{cls.__module__}.{cls.__qualname__}.forward")
    return wrapped


def ensure_boundaries(model: torch.nn.Module, gate: Gate) -> tuple[int, int]:
    """Make sure that a loaded model can be stopped at least once in each of its layers.

    Returns the number of places in it where it can be stopped, and how many of its layers had none and were made one as
    a whole, as layers are that bring operators of their own. A model without ``layers`` and without operators of
    SGLang's has no place at all: the caller must run it whole.
    """
    whole = [layer for layer in _decoder_layers(model) if not any(_is_bounded(module) for module in layer.modules())]
    for layer in whole:
        layer.forward = _bounded(layer.forward, gate, owner=layer)
    return sum(_is_bounded(module) for module in model.modules()), len(whole)


def boundary_owners(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a model at whose entry a forward pass can be stopped, without those inside of one."""
    for child in model.children():
        if _is_bounded(child):
            yield child
        else:
            yield from boundary_owners(child)


def _bounded(
    function: Callable[..., Any],
    gate: Gate,
    *,
    owner: object = None,
    slices: SlicedOperators | None = None,
    kind: Kind | None = None,
) -> Callable[..., Any]:
    """``owner``: of a bound function; else it is the first argument. ``kind``: as what ``slices`` may cut it."""
    number = crc32(f"{function.__module__}.{function.__qualname__}".encode())  # the same on every rank
    cuts = None if kind is None else slices
    cut = cuts and (cuts.attention if kind is Kind.ATTENTION else cuts.rows)

    @wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:  # the operator's own signature
        if is_dynamo_compiling() or gate.is_closed:  # in this order, or compiled code would depend on the gate
            return function(*args, **kwargs)
        if cuts and cut and cuts.is_on and (found := cut(function, args, kwargs)) is not None:
            return cuts.run(args[0], *found)
        gate.cross(number, args[0] if owner is None else owner)
        try:
            return function(*args, **kwargs)
        finally:
            gate.is_closed = False

    setattr(operator, _MARK, gate)
    return operator


def _cut(function: Callable[..., Any], gate: Gate, slices: SlicedOperators) -> Callable[..., Any]:
    """An element-wise layer: no boundary, unless it is long."""

    @wraps(function)
    def layer(*args: Any, **kwargs: Any) -> Any:  # the layer's own signature
        if is_dynamo_compiling() or gate.is_closed or not slices.is_on:
            return function(*args, **kwargs)
        if (found := slices.elementwise(function, args, kwargs)) is None:
            return function(*args, **kwargs)
        return slices.run(args[0], *found)

    setattr(layer, _CUT_MARK, gate)
    return layer


def _refuse_another(function: Callable[..., Any], mark: str, cls: type, method: str) -> None:
    if hasattr(function, mark):
        raise InternalError(f"{cls.__qualname__}.{method} has a boundary of another gate already")


def _resolve(name: str) -> type:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise StartupError(f"SGLang {sglang_version()} has no operator class {name}: {error}") from error
    if not isinstance(found, type):
        raise StartupError(f"SGLang {sglang_version()}: {name} is not a class")
    return found


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    below: list[type] = cls.__subclasses__()
    for subclass in below:
        yield from _with_subclasses(subclass)


def _is_bounded(module: torch.nn.Module) -> bool:
    return hasattr(module.forward, _MARK)


def _decoder_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == LAYERS and isinstance(module, torch.nn.ModuleList):
            yield from module
