"""SGLang settings that a FlowPrefill prefill worker cannot run with: refused at start-up, each with what to do instead.

A combination that is not known to be right is refused rather than tried: a suspended forward pass that meets state we
do not move gives wrong KV without any error. Settings are those of SGLang 0.5.23, after its own resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.prefill_worker.settings import SchedulerKind

STOCK = f"or --prefill-scheduler {SchedulerKind.STOCK} to keep it without preemption"


@contextmanager
def refused_by_sglang() -> Iterator[None]:
    """Raise StartupError for what SGLang's own resolution and checks of its settings raise within this block.

    SGLang has no exception of its own for them: it raises ValueError, NotImplementedError or AssertionError (and has
    bare ``assert`` statements), and transformers, which reads the model's configuration for it, OSError when there is
    none. Anything else is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        raise StartupError(f"SGLang refuses these settings: {error}") from error


def refuse_what_cannot_work(settings: Any, kind: SchedulerKind) -> None:
    """Raise BadInput when ``settings``, SGLang's resolved ones, cannot be served with this scheduler."""
    reasons = dict(_worker(settings))
    if kind is SchedulerKind.FLOWPREFILL:
        reasons |= _scheduler(settings)
    for reason, applies in reasons.items():
        if applies:
            raise BadInput(f"a FlowPrefill prefill worker cannot run with {reason}")


def _worker(settings: Any) -> dict[str, bool]:
    """What the link to the router cannot work with, whichever scheduler runs."""
    return {
        "--tokenizer-worker-num above 1: the link to the router lives in SGLang's only HTTP process; start more "
        "prefill workers instead": settings.tokenizer_worker_num > 1,
        "--use-ray: SGLang's Ray engine loads no plugins; run whole workers under Ray instead": settings.use_ray,
        "--enable-http2: the link needs SGLang's uvicorn server; put HTTP/2 in front of the router": (
            settings.enable_http2
        ),
        "--grpc-mode or --smg-grpc-mode: the link calls SGLang's HTTP handlers": (
            settings.smg_grpc_mode or settings.grpc_mode
        ),
        "--encoder-only: an encoder does not prefill": settings.encoder_only,
    }


def _scheduler(settings: Any) -> dict[str, bool]:
    """What suspended forward passes cannot live with."""
    return {
        f"--speculative-algorithm: a draft model's state is shared between forward passes; give it to the decode "
        f"instances only, {STOCK}": settings.speculative_algorithm is not None,
        f"--pp-size above 1: a stage cannot stop while the next one waits for it; use --tp-size, {STOCK}": (
            settings.pp_size > 1
        ),
        f"--enable-dp-attention or --dp-size above 1: ranks that run in step cannot stop alone; start more prefill "
        f"workers, {STOCK}": settings.enable_dp_attention or settings.dp_size > 1,
        f"--nnodes above 1: ranks agree on the boundary to stop at in memory that they share; use a --tp-size that one "
        f"machine holds and start more prefill workers, {STOCK}": settings.nnodes > 1,
        f"--attn-cp-size above 1: context-parallel ranks run in step; use --chunked-prefill-size, {STOCK}": (
            settings.attn_cp_size > 1
        ),
        f"--enable-two-batch-overlap or --enable-single-batch-overlap: they interleave operators themselves; leave "
        f"them out, {STOCK}": settings.enable_two_batch_overlap or settings.enable_single_batch_overlap,
        f"--moe-a2a-backend {settings.moe_a2a_backend}: all-to-all expert parallelism needs every rank in step; leave "
        f"it out, {STOCK}": settings.moe_a2a_backend not in (None, "none"),
        f"--enable-hierarchical-cache or --enable-lmcache: their copies are polled by SGLang's own loop; leave them "
        f"out, {STOCK}": settings.enable_hierarchical_cache or settings.enable_lmcache,
        f"--enable-pdmux: a prefill worker does not decode; leave it out, {STOCK}": settings.enable_pdmux,
        f"--dllm-algorithm: diffusion models do not prefill once; {STOCK}": settings.dllm_algorithm is not None,
        f"--enable-pd-role-switch: the loop cannot become a decode loop; start a decode instance, {STOCK}": (
            settings.enable_pd_role_switch
        ),
        f"--optimistic-prefill-attempts: a request is started once its decode instance is ready, not before; leave it "
        f"out, {STOCK}": settings.optimistic_prefill_attempts > 0,
        f"--schedule-policy {settings.schedule_policy}: --scheduler-policy decides here; leave it out, {STOCK}": (
            settings.schedule_policy != "fcfs"
        ),
        f"--scheduler-recv-interval above 1: events must be seen when they come; leave it out, {STOCK}": (
            settings.scheduler_recv_interval > 1
        ),
        f"--enable-lora-overlap-loading: an adapter could be copied over one that a suspended pass reads; leave it "
        f"out, {STOCK}": settings.enable_lora_overlap_loading,
        f"--kv-canary {settings.kv_canary}: it checks one batch after the other; leave it out, {STOCK}": (
            settings.kv_canary not in (None, "none", "off")
        ),
        f"--expert-distribution-recorder-mode: it records one forward pass at a time; leave it out, {STOCK}": (
            settings.expert_distribution_recorder_mode is not None
        ),
    }
