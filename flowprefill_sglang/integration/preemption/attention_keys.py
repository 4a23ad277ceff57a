"""Attention of SGLang 0.5.23's ``triton`` backend by segments of the keys, merged by log-sum-exp.

Its kernel gives a block of query rows of one head, with all of its keys, to one multiprocessor. However few rows a
tile has, it lasts as long as one block against all keys: 2.8 ms at 131,072 keys on an H100 at 400 TFLOP/s, blocks of
128 rows and heads of 128. So its tiles have as many rows as keep all multiprocessors busy, and where that is too long,
keys are cut. The kernels of ``fa3`` and ``flashinfer`` spread the keys of a short tile over the device by themselves.

A segment is a call of the layer's own ``forward`` for which the backend object sees less: its index of cached keys is
narrowed, and its kernel is asked for the LSE too and to leave out the tile's own keys, or the cached ones. The kernel
has these switches for context parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from flowprefill_sglang.core.slicing import wave_rows

TRITON_KEY_BLOCK: Final = 64
"""Keys that its kernel takes at a time, a divisor of it on every GPU."""
TRITON_ROW_BLOCK: Final = 128
"""Query rows of one head that it takes at a time, at most: 128 on Ampere and Hopper with heads of up to 128."""
BACKEND: Final = "TritonAttnBackend"

Segment = tuple[int, int]
"""Of the cached keys."""


def least_rows(backend_name: str, heads: int, device: torch.device) -> int:
    """Fewer query rows than these take no less time; 0 where the backend's kernel has no such bound, or on a CPU.

    ``backend_name``: name of the backend's class; ``heads``: of queries, of this rank.
    """
    if backend_name != BACKEND or device.type != "cuda":
        return 0
    return wave_rows(torch.cuda.get_device_properties(device).multi_processor_count, heads, TRITON_ROW_BLOCK)


def can_split(backend: Any, layer: Any) -> bool:
    """Whether this layer's keys can be cut on this backend object.

    Not with what its kernel takes from a key's place (windows, temperature by position), nor where other kernels run:
    MLA, deterministic inference, context parallelism, diffusion models.
    """
    return (
        type(backend).__name__ == BACKEND
        and not (backend.use_mla or backend.enable_deterministic or backend.dcp_size > 1)
        and backend.dllm_attention is None
        and layer.sliding_window_size <= -1
        and layer.xai_temperature_len <= 0
    )


def attend_part(call: Callable[[], torch.Tensor], backend: Any, lse: torch.Tensor, segment: Segment | None) -> Any:
    """What ``call`` returns, a forward of a layer on ``backend`` for rows of one request, when it sees no keys but the
    cached ones of ``segment``; None: but the rows' own.

    ``lse``: float32 ``[rows, heads]`` on the rows' device, to be written. Raises what ``call`` raises.
    """
    metadata, kernel = backend.forward_metadata, backend.extend_attention_fwd
    if segment is None:
        backend.extend_attention_fwd = partial(kernel, lse_extend=lse, skip_prefix=True)
    else:
        begin, end = segment
        backend.extend_attention_fwd = partial(kernel, lse_extend=lse, skip_extend=True)
        backend.forward_metadata = replace(
            metadata,
            kv_indptr=torch.tensor([0, end - begin], dtype=metadata.kv_indptr.dtype, device=metadata.kv_indptr.device),
            kv_indices=metadata.kv_indices[begin:end],
        )
    try:
        return call()
    finally:
        backend.forward_metadata, backend.extend_attention_fwd = metadata, kernel
