"""Each setting that a worker cannot run with is refused, by the name of its flag, with what to do instead."""

from dataclasses import dataclass, replace

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.integration.prefill import refusals
from flowprefill_sglang.integration.prefill.refusals import refuse_what_cannot_work
from flowprefill_sglang.prefill_worker.settings import SchedulerKind
from flowprefill_testing.sglang_process import facts_of


@dataclass(frozen=True)
class Settings:
    """SGLang's own defaults, of what is looked at."""

    tokenizer_worker_num: int = 1
    use_ray: bool = False
    enable_http2: bool = False
    smg_grpc_mode: bool = False
    grpc_mode: bool = False
    encoder_only: bool = False
    speculative_algorithm: str | None = None
    pp_size: int = 1
    enable_dp_attention: bool = False
    dp_size: int = 1
    nnodes: int = 1
    attn_cp_size: int = 1
    enable_two_batch_overlap: bool = False
    enable_single_batch_overlap: bool = False
    moe_a2a_backend: str = "none"
    enable_hierarchical_cache: bool = False
    enable_lmcache: bool = False
    enable_pdmux: bool = False
    dllm_algorithm: str | None = None
    enable_pd_role_switch: bool = False
    optimistic_prefill_attempts: int = 0
    schedule_policy: str = "fcfs"
    scheduler_recv_interval: int = 1
    enable_lora_overlap_loading: bool = False
    kv_canary: str = "none"
    expert_distribution_recorder_mode: str | None = None


OF_THE_WORKER = [
    ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
    ({"use_ray": True}, "--use-ray"),
    ({"enable_http2": True}, "--enable-http2"),
    ({"smg_grpc_mode": True}, "--smg-grpc-mode"),
    ({"grpc_mode": True}, "--grpc-mode"),
    ({"encoder_only": True}, "--encoder-only"),
]
OF_THE_SCHEDULER = [
    ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
    ({"pp_size": 2}, "--pp-size"),
    ({"enable_dp_attention": True}, "--enable-dp-attention"),
    ({"dp_size": 2}, "--dp-size"),
    ({"nnodes": 2}, "--nnodes"),
    ({"attn_cp_size": 2}, "--attn-cp-size"),
    ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
    ({"enable_single_batch_overlap": True}, "--enable-single-batch-overlap"),
    ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep"),
    ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
    ({"enable_lmcache": True}, "--enable-lmcache"),
    ({"enable_pdmux": True}, "--enable-pdmux"),
    ({"dllm_algorithm": "LowConfidence"}, "--dllm-algorithm"),
    ({"enable_pd_role_switch": True}, "--enable-pd-role-switch"),
    ({"optimistic_prefill_attempts": 1}, "--optimistic-prefill-attempts"),
    ({"schedule_policy": "lpm"}, "--schedule-policy lpm"),
    ({"scheduler_recv_interval": 2}, "--scheduler-recv-interval"),
    ({"enable_lora_overlap_loading": True}, "--enable-lora-overlap-loading"),
    ({"kv_canary": "log"}, "--kv-canary log"),
    ({"expert_distribution_recorder_mode": "stat"}, "--expert-distribution-recorder-mode"),
]


def test_sglangs_defaults_are_served() -> None:
    for kind in SchedulerKind:
        refuse_what_cannot_work(Settings(), kind)


@pytest.mark.parametrize(("changed", "flag"), OF_THE_WORKER)
@pytest.mark.parametrize("kind", list(SchedulerKind))
def test_what_the_link_cannot_work_with(changed: dict, flag: str, kind: SchedulerKind) -> None:
    with pytest.raises(BadInput, match=flag) as refused:
        refuse_what_cannot_work(replace(Settings(), **changed), kind)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("changed", "flag"), OF_THE_SCHEDULER)
def test_what_suspended_passes_cannot_live_with(changed: dict, flag: str) -> None:
    settings = replace(Settings(), **changed)
    with pytest.raises(BadInput, match=flag) as refused:
        refuse_what_cannot_work(settings, SchedulerKind.FLOWPREFILL)
    assert "\n" not in str(refused.value)
    assert "--prefill-scheduler stock" in str(refused.value), "there is a way to run with it"
    refuse_what_cannot_work(settings, SchedulerKind.STOCK)


def test_every_reason_is_tried_here() -> None:
    """A refusal that is added needs its line above."""
    flags = [flag for _, flag in OF_THE_WORKER + OF_THE_SCHEDULER]
    settings = replace(Settings(), moe_a2a_backend="deepep", schedule_policy="lpm", kv_canary="log")
    for reason in refusals._worker(settings) | refusals._scheduler(settings):
        assert any(flag in reason for flag in flags), reason


def test_the_settings_are_sglangs() -> None:
    """A setting that SGLang renames must fail here, not in front of a user."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of("""
        from sglang.srt.server_args import ServerArgs

        facts["names"] = list(ServerArgs.__annotations__)
    """)
    assert set(Settings.__annotations__) <= set(facts["names"])
