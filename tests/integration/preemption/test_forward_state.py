"""Every saved item against SGLang's own state: two interleaved tasks set it by SGLang's own means and must each find
their own value again, and the hub its own; with that one item left out, they must not.

Whole forwards are in ``tests/exactness``; many items belong to features that need a GPU or a model of their own, and
are seen here only.
"""

from __future__ import annotations

from typing import Any

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

SCRIPT = """
    import contextlib, time
    import torch
    from types import SimpleNamespace
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    runtime_context.publish(
        ServerArgs(model_path="dummy"), role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    )
    from sglang.srt.layers import dp_attention, layernorm_sp, zero_copy_context
    from sglang.srt.layers.moe import route_quant_handoff
    from sglang.srt.lora.trtllm_lora_temp import shared_add_overlap
    from sglang.srt.managers.cache_controller import LayerDoneCounter
    from sglang.srt.model_executor import forward_context
    from sglang.srt.observability.scheduler_stage_metrics import SchedulerStageMetricsRecorder
    from flowprefill_sglang.errors import InternalError
    from flowprefill_sglang.integration.preemption.forward_state import ForwardState, obstacles
    from flowprefill_sglang.prefill_worker.boundaries import Gate
    from flowprefill_sglang.prefill_worker.task import ForwardTask

    counter = object.__new__(LayerDoneCounter)
    counter.reset()
    timer = SimpleNamespace(_in_wrap=False)
    lora = SimpleNamespace(batch_info="no batch")
    runner = SimpleNamespace(
        attn_backend="home",
        device="cpu",
        device_timer=timer,
        lora_manager=SimpleNamespace(lora_backend=lora),
        token_to_kv_pool=SimpleNamespace(layer_transfer_counter=counter),
    )
    stages = SchedulerStageMetricsRecorder(enabled=True)
    stages.start(time.monotonic_ns())

    @contextlib.contextmanager
    def assigned(owner, name, value):
        previous = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, previous)

    @contextlib.contextmanager
    def called(function, value, after):
        function(value)
        try:
            yield
        finally:
            function(after)

    stage_of = {"a": "run_batch", "b": "process_batch_result"}
    number_of = {"a": 1, "b": 2}
    size_of = lambda n: dp_attention._DpGatheredBufferWrapper.set_dp_buffer_len(n, n, bool(n))
    handoff = route_quant_handoff
    add = shared_add_overlap
    SCOPES = {  # item: what a forward does, and how the value is read
        "forward_context": (
            lambda v: forward_context.forward_context(forward_context.ForwardContext(attn_backend=v)),
            lambda: forward_context._current and forward_context.get_attn_backend(),
        ),
        "attn_backend": (lambda v: assigned(runner, "attn_backend", v), lambda: runner.attn_backend),
        "forward_flags": (
            lambda v: runtime_context.get_forward().scoped(mlp_reduce_scatter=v),
            lambda: runtime_context.get_forward().mlp_reduce_scatter,
        ),
        "model_config_overrides": (
            lambda v: runtime_context.get_model().override(shared_experts=v),
            lambda: str(runtime_context.get_model().shared_experts),
        ),
        "parallel_overrides": (
            lambda v: runtime_context.get_parallel().override(tp_group=SimpleNamespace(world_size=1, name=v)),
            lambda: vars(runtime_context.get_parallel()._overrides.get("tp_group", SimpleNamespace())).get("name"),
        ),
        "dp_buffer_sizes": (
            lambda v: called(size_of, number_of[v], 0), dp_attention._DpGatheredBufferWrapper.get_global_dp_buffer_len
        ),
        "layernorm_sp": (
            lambda v: called(layernorm_sp.set_sp_num_tokens, number_of[v], 0), layernorm_sp.sp_num_tokens
        ),
        "route_quant_handoff": (
            lambda v: called(lambda x: handoff.stage(x) if x else handoff.clear(), v, None),
            lambda: handoff._handoff.request_x,
        ),
        "moe_output": (zero_copy_context.set_moe_output, lambda: zero_copy_context.ctx.moe_output),
        "lora_shared_add": (
            lambda v: called(lambda x: add.stage_shared_expert_add(x, None) if x else add.unstage_shared_expert_add(),
                             v, None),
            lambda: add._PENDING and add._PENDING[0],
        ),
        "lora_batch": (lambda v: assigned(lora, "batch_info", v), lambda: lora.batch_info),
        "hierarchical_cache_load": (
            lambda v: called(counter.set_consumer, number_of[v], -1), lambda: counter.consumer_index
        ),
        "scheduler_stage": (lambda v: stages.record(stage_of[v]), lambda: stages._current_stage),
        "device_timer": (lambda v: assigned(timer, "_in_wrap", True), lambda: timer._in_wrap),
    }
    torch.set_grad_enabled(False)

    def wrong(name, without):
        gate, found = Gate(), []
        state = ForwardState(runner, stage_metrics=stages, without=without)
        scope, read = SCOPES[name]
        hubs = read()

        def forward(value):
            with scope(value):
                mine = read()
                for _ in range(2):
                    gate.cross()
                    if read() != mine:
                        found.append(f"{value} sees {read()}")

        tasks = [ForwardTask(lambda v=v: forward(v), gate, state) for v in "ab"]
        gate.raise_flag()
        for task in [*tasks, *tasks, *tasks]:
            task.advance()
            if read() != hubs:
                found.append(f"hub sees {read()}")
        assert all(task.is_over for task in tasks)
        return found

    full = ForwardState(runner, stage_metrics=stages)
    clean = full.save()
    facts["items"] = [item.name for item in full.items]
    facts["why"] = [item.why for item in full.items]
    facts["with"], facts["without"] = {}, {}
    for name in SCOPES:
        facts["with"][name] = wrong(name, [])
        facts["without"][name] = wrong(name, [name])
        full.restore(clean)

    facts["may stop"] = [full.may_stop()]
    def fails():
        facts["may stop"].append(full.may_stop())
        try:
            full.check()
        except InternalError as error:
            return True
    with torch.enable_grad():
        facts["grad"] = fails()
    with torch.inference_mode():
        facts["inference"] = fails()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        facts["autocast"] = fails()
    with torch.device("meta"):
        facts["function mode"] = fails()
    torch.set_default_dtype(torch.float64)
    facts["dtype"] = fails()
    torch.set_default_dtype(torch.float32)
    full.check()
    try:
        ForwardState(runner, without=["misspelt"])
    except InternalError as error:
        facts["unknown"] = str(error)
    facts["obstacles"] = obstacles()
    with runtime_context.get_exec().moe.override(enable_eplb=True):
        facts["eplb"] = obstacles()
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return facts_of(SCRIPT)


ITEMS = [
    "forward_context",
    "attn_backend",
    "forward_flags",
    "model_config_overrides",
    "parallel_overrides",
    "dp_buffer_sizes",
    "layernorm_sp",
    "route_quant_handoff",
    "moe_output",
    "lora_shared_add",
    "lora_batch",
    "hierarchical_cache_load",
    "scheduler_stage",
    "device_timer",
]


def test_the_list_of_items_is_complete(facts: dict[str, Any]) -> None:
    assert facts["items"] == ITEMS
    assert all(facts["why"])


@pytest.mark.parametrize("item", ITEMS)
def test_item_is_kept_apart_and_is_missed_when_left_out(facts: dict[str, Any], item: str) -> None:
    assert facts["with"][item] == []
    assert facts["without"][item], "a check that cannot fail"


@pytest.mark.parametrize("mode", ["grad", "inference", "autocast", "function mode", "dtype"])
def test_a_changed_mode_is_refused(facts: dict[str, Any], mode: str) -> None:
    assert facts[mode]


def test_no_stop_under_a_changed_mode(facts: dict[str, Any]) -> None:
    assert facts["may stop"] == [True, False, False, False, False, False]


def test_an_unknown_item_cannot_be_left_out(facts: dict[str, Any]) -> None:
    assert "misspelt" in facts["unknown"]


def test_obstacles_are_those_of_the_configuration(facts: dict[str, Any]) -> None:
    assert facts["obstacles"] == []
    assert facts["eplb"] == ["--enable-eplb moves experts between two forwards"]
