"""What one SGLang 0.5.23 forward shares with the next, and how it is kept apart while one of them is suspended.

Four ways, in the order of preference:

* *Not shared*: ``SGLANG_EAGER_INPUT_NO_COPY=1`` (set by the plugin) gives each batch its own input tensors, a task runs
  in its own copy of the context variables (``multi_stream``, ``moe_output_buffer``, graph capture state), and
  ``attention_slots`` gives it its own attention backend.
* *Saved and restored*: ``items`` below, one ``Item`` each.
* *Not left*: where a region is entered that cannot be carried over, ``may_stop`` postpones the stop: a side stream, a
  capture, a symmetric-memory region, a changed thread-local mode. Operators and graph replays are atomic anyhow.
* *Not interruptible*: ``obstacles`` names what a configuration uses that has none of these, and whose forwards must
  therefore run whole.

Not kept apart on purpose: the random generator (a sampled token depends on the order of sampling; greedy output and
distributions do not), counters (``forward_pass_id``, ``forward_ct``), and what only profilers see: NVTX and step ranges
nest by time, and SGLang's forward timer counts the time that a forward was suspended.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from flowprefill_sglang.errors import InternalError, StartupError
from flowprefill_sglang.integration.hooks import sglang_version

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class Item:
    """One piece of state. Without it, ``why`` happens."""

    name: str
    why: str
    take: Callable[[], Any]
    put: Callable[[Any], None]


def attribute(owner: Any, name: str, why: str, label: str | None = None) -> Item:
    """The attribute of a module, a class or an object, by reference. AttributeError if there is none now."""
    getattr(owner, name)
    return Item(
        name=label or f"{getattr(owner, '__name__', type(owner).__name__)}.{name}",
        why=why,
        take=lambda: getattr(owner, name),
        put=lambda value: setattr(owner, name, value),
    )


def items(model_runner: ModelRunner, stage_metrics: Any = None) -> list[Item]:
    """Everything that is saved and restored for this model.

    ``stage_metrics`` is the scheduler's ``scheduler_stage_metrics``, where there is a scheduler. StartupError when
    SGLang lacks one of the places.
    """
    try:
        return [
            *_of_every_forward(model_runner),
            *_of_some_models(),
            *_of_lora(model_runner),
            *_of_host_cache(model_runner),
            *_of_measurements(model_runner, stage_metrics),
        ]
    except (ImportError, AttributeError) as error:
        raise StartupError(
            f"SGLang {sglang_version()} keeps the state of a forward elsewhere than FlowPrefill knows: {error}"
        ) from error


def _of_every_forward(model_runner: ModelRunner) -> list[Item]:
    from sglang.srt import runtime_context

    context = import_module("sglang.srt.model_executor.forward_context")
    flags, model, parallel = runtime_context.get_forward(), runtime_context.get_model(), runtime_context.get_parallel()
    return [
        attribute(
            context,
            "_current",
            "a resumed forward reads another one's attention metadata, and the next forward starts inside of a "
            "suspended one",
            label="forward_context",
        ),
        attribute(
            model_runner,
            "attn_backend",
            "forwards that end out of order leave a task's own attention backend behind as everybody's",
            label="attn_backend",
        ),
        Item(
            name="forward_flags",
            why="flags that a decoder layer sets around an operator (skip the all-reduce, defer the MoE's last step, "
            "scattered inputs) reach another forward's layers",
            take=lambda: dict(flags._plain),
            put=flags._plain.update,  # the flags are declared: none is ever added or removed
        ),
        Item(
            name="model_config_overrides",
            why="forwards that end out of order leave the shared-experts override of one in place for good",
            take=lambda: dict(object.__getattribute__(model, "_fields")),
            put=lambda fields: _restore_bag(model, fields),
        ),
        Item(
            name="parallel_overrides",
            why="a scoped change of parallel sizes reaches another forward (multiplexed and draft execution)",
            take=lambda: dict(parallel._overrides),
            put=lambda overrides: setattr(parallel, "_overrides", dict(overrides)),
        ),
    ]


def _restore_bag(bag: Any, fields: dict[str, Any]) -> None:  # a configuration namespace of SGLang
    now = object.__getattribute__(bag, "_fields")
    if all(map(operator.is_, now.values(), fields.values())):  # some hundred values, nearly always the same
        return
    for name, value in fields.items():
        if now[name] is not value:
            bag._set(name, value)


def _of_some_models() -> list[Item]:
    buffers = import_module("sglang.srt.layers.dp_attention")._DpGatheredBufferWrapper
    handoff = import_module("sglang.srt.layers.moe.route_quant_handoff")._handoff
    zero_copy = import_module("sglang.srt.layers.zero_copy_context").ctx
    force_setattr = import_module("msgspec").structs.force_setattr
    sizes = (
        "_global_dp_buffer_len",
        "_local_dp_buffer_len",
        "_dp_max_padding",
        "_global_num_tokens",
        "_global_num_tokens_gpu",
    )
    return [
        _several(buffers, sizes, "dp_buffer_sizes", "gathered buffers get another batch's number of tokens"),
        attribute(
            import_module("sglang.srt.layers.layernorm_sp")._sp_state,
            "num_tokens",
            "sequence-parallel layers drop another forward's padding (--enable-layernorm-sp)",
            label="layernorm_sp",
        ),
        _several(
            handoff,
            tuple(handoff.__struct_fields__),
            "route_quant_handoff",
            "an MoE layer takes activations that another forward has staged (Kimi K3)",
        ),
        Item(
            name="moe_output",
            why="an MoE layer writes its output into another forward's tensor",
            take=lambda: zero_copy.moe_output,
            put=lambda value: force_setattr(zero_copy, "moe_output", value),
        ),
        attribute(
            import_module("sglang.srt.lora.trtllm_lora_temp.shared_add_overlap"),
            "_PENDING",
            "a LoRA MoE layer adds another forward's shared-expert output",
            label="lora_shared_add",
        ),
    ]


def _several(owner: Any, names: tuple[str, ...], label: str, why: str) -> Item:
    def put(values: tuple[Any, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(owner, name, value)

    take = operator.attrgetter(*names)
    take(owner)
    return Item(name=label, why=why, take=lambda: take(owner), put=put)


def _of_lora(model_runner: ModelRunner) -> list[Item]:
    manager = getattr(model_runner, "lora_manager", None)
    if manager is None:
        return []
    backend = manager.lora_backend
    return [
        Item(
            name="lora_batch",
            why="LoRA layers apply another batch's adapters",
            take=lambda: dict(vars(backend)),
            put=vars(backend).update,
        )
    ]


def _of_measurements(model_runner: ModelRunner, stage_metrics: Any) -> list[Item]:
    found = []
    if stage_metrics is not None:
        found.append(_stage(stage_metrics))
    if getattr(model_runner, "device_timer", None) is not None:
        found.append(
            attribute(
                model_runner.device_timer,
                "_in_wrap",
                "SGLang's forward timer refuses the next forward as a nested one",
                label="device_timer",
            )
        )
    return found


def _of_host_cache(model_runner: ModelRunner) -> list[Item]:
    counter = getattr(model_runner.token_to_kv_pool, "layer_transfer_counter", None)
    if counter is None:
        return []
    return [
        attribute(
            counter,
            "consumer_index",
            "a forward waits for the wrong load from the hierarchical cache and reads KV before it is there",
            label="hierarchical_cache_load",
        )
    ]


def _stage(recorder: Any) -> Item:  # SchedulerStageMetricsRecorder
    def put(stages: tuple[str, str | None]) -> None:
        if recorder._current_stage != stages[0] and recorder.enter(stages[0]) is None:
            recorder._current_stage = stages[0]  # switched off: nothing is counted
        recorder._trace_stage = stages[1]

    return Item(
        name="scheduler_stage",
        why="SGLang's metrics count the time of the loop, and of other forwards, as this forward's",
        take=lambda: (recorder._current_stage, recorder._trace_stage),
        put=put,
    )


def thread_modes(device: str = "cpu") -> tuple[Any, ...]:
    """The modes of PyTorch that belong to the thread, so that hub and tasks share them."""
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
    if device == "cpu":
        return modes
    accelerator = torch.get_device_module(device)
    return (
        *modes,
        torch.is_autocast_enabled(device),
        accelerator.current_device(),
        accelerator.current_stream().stream_id,
    )


OBSTACLES: tuple[tuple[str, str], ...] = (
    ("exec.moe.expert_distribution_recorder_mode", "records expert routing of one forward at a time"),
    ("exec.moe.enable_eplb", "moves experts between two forwards"),
    ("exec.moe.elastic_ep_backend", "repeats forwards"),
    ("exec.features.enable_return_routed_experts", "keeps the routing of one forward in one buffer"),
    ("exec.features.enable_return_indexer_topk", "keeps the index of one forward in one buffer"),
    ("exec.overlap.enable_two_batch_overlap", "keeps two halves of one batch in module state"),
    ("exec.overlap.enable_single_batch_overlap", "runs parts of a layer on other streams across operators"),
    ("exec.dllm.dllm_algorithm", "repeats forwards"),
    ("disagg.enable_pdmux", "switches streams and backends during a forward"),
    ("observability.msprobe_dump_config", "dumps one forward at a time"),
)
"""Settings of SGLang, by namespace, with which a forward cannot be suspended, and what they do."""


def obstacles() -> list[str]:
    """Why forwards of this process's configuration must run whole; none: they can be suspended.

    StartupError when SGLang lacks one of the settings.
    """
    from sglang.srt import runtime_context

    found = []
    for path, why in OBSTACLES:
        namespace, *rest = path.split(".")
        try:
            value = getattr(runtime_context, f"get_{namespace}")()
            for name in rest:
                value = getattr(value, name)
        except AttributeError as error:
            raise StartupError(f"SGLang {sglang_version()} has no setting {path}: {error}") from error
        if value:
            found.append(f"--{rest[-1].replace('_', '-')} {why}")
    return found


class ForwardState:
    """``SharedState`` (``prefill_worker.task``) of a real SGLang model. Owned by the scheduler's thread, and to be made
    there, inside of the loop: the modes of that moment are those that hub and tasks keep.

    ``without`` leaves out items by name; it is for tests that must see what an item is for.
    """

    def __init__(self, model_runner: ModelRunner, *, stage_metrics: Any = None, without: Collection[str] = ()) -> None:
        found: Sequence[Item] = items(model_runner, stage_metrics)
        unknown = set(without) - {item.name for item in found}
        if unknown:
            raise InternalError(f"no such state: {sorted(unknown)}")
        self.items = [item for item in found if item.name not in without]
        self._takes = [item.take for item in self.items]
        self._puts = [item.put for item in self.items]
        self._device = torch.device(model_runner.device).type
        self._modes = thread_modes(self._device)
        self._allocator = import_module("sglang.srt.distributed.device_communicators.pynccl_allocator")
        self._capture = import_module("sglang.srt.model_executor.runner_utils.capture_mode")

    def save(self) -> object:
        """The value of every item."""
        return [take() for take in self._takes]

    def restore(self, saved: object) -> None:
        """Put back what ``save`` returned."""
        assert isinstance(saved, list)
        for put, value in zip(self._puts, saved, strict=True):
            put(value)

    def may_stop(self) -> bool:
        """False inside of a region that another forward must not run in."""
        if self._allocator._active_symmetric_memory_context is not None or self._capture.is_capture_mode:
            return False
        if self._device == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        return thread_modes(self._device) == self._modes

    def check(self) -> None:
        """Raise InternalError if this thread's modes are not those of the loop."""
        modes = thread_modes(self._device)
        if modes != self._modes:
            raise InternalError(f"a forward pass has changed this thread's modes from {self._modes} to {modes}")
