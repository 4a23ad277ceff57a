"""Attention of SGLang 0.5.23 by query rows: one call of the backend for each tile of them.

Rows ``i:j`` of a request attend to its cached prefix, its first ``i`` new tokens and themselves. That is what the
backend computes for a request with ``i`` more cached tokens and ``j - i`` new ones, once the KV of the first ``i`` is
written. So each tile gets a ``ForwardBatch`` that says so, a backend object planned for it, and RadixAttention's own
``forward``, which writes the tile's KV too. This uses nothing but what every backend does for chunked prompts.

Plans are kept in ``PLANS`` spare backend objects, the least recently used of which is planned anew: a forward of few
tiles plans each of them once, not once a layer, and suspended forwards hold none.

torch_native is the exception. It computes a cached prefix again as queries, so its last tile would take as long as the
whole. Its tiles are computed by ``kernels.attention_state`` from the same KV, bit for bit as it computes them whole.

Where even the fewest rows against all keys are too long, torch_native and triton (``attention_keys``) compute segments
of the keys, whose states are merged. Tiles of other backends are not split by keys: their kernels do that themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from typing import Any, Final

import torch

from flowprefill_sglang.core.prefill_cost import Extent
from flowprefill_sglang.core.slicing import GRANULE_ROWS, OperatorCosts, Tile, attention_tiles, key_segments
from flowprefill_sglang.integration.preemption.attention_keys import (
    TRITON_KEY_BLOCK,
    Segment,
    attend_part,
    can_split,
)
from flowprefill_sglang.kernels.attention_state import (
    CPU_KEY_BLOCK,
    attend_rows,
    attend_segment,
    merge_states,
)

PLANS: Final = 32
"""Backend objects for tiles. With flashinfer each holds some megabytes of workspace."""
_TILES: Final = "_flowprefill_tiles"
Keys = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""K and V of some keys of one request, by their places in it."""
Steps = Generator[None, None, Any]
"""Slices of an operator: yields between two of them; its value is what the operator returns."""


class AttentionTiles:
    """Cuts attention calls of one model. Owned by the scheduler's thread."""

    def __init__(
        self, build_backend: Callable[[], Any], backend_name: str, *, granule_rows: int = GRANULE_ROWS
    ) -> None:
        """``build_backend`` makes an attention backend of the model, as ``AttentionSlots`` does; ``backend_name`` is
        the name of its class. ``granule_rows`` as for ``attention_tiles``."""
        self._granule_rows = granule_rows
        self._build = build_backend
        self._is_torch_native = backend_name == "TorchNativeAttnBackend"
        self._plans: OrderedDict[tuple[int, int], tuple[Any, Any]] = OrderedDict()  # (ForwardBatch, backend) by tile
        self._numbers = count()
        self._costs = OperatorCosts(0.0, 0.0)
        self._max_blocking_s = float("inf")

    def set_costs(self, costs: OperatorCosts, max_blocking_s: float) -> None:
        """Cut what takes longer than ``max_blocking_s`` by these costs."""
        self._costs, self._max_blocking_s = costs, max_blocking_s

    def steps(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Steps, int] | None:
        """The slices of a call of ``RadixAttention.forward`` and how many there are; None: it is short, or of a kind
        that runs whole."""
        if len(args) not in (5, 6) or not kwargs.keys() <= {"save_kv_cache"}:
            return None  # MLA, sparse and other attention with more inputs
        layer, q, k, v, batch = args[:5]
        found = batch.__dict__.get(_TILES)
        if found is None:
            found = (next(self._numbers), self._tiles(batch))
            setattr(batch, _TILES, found)
        number, tiles = found
        if not tiles or k is None or v is None or not _is_causal(layer, q, batch):
            return None
        save = args[5] if len(args) == 6 else kwargs.get("save_kv_cache", True)
        if self._is_torch_native:
            if layer.sliding_window_size > -1:
                return None
            return _native(layer, q, k, v, batch, tiles, save), _count(batch, tiles, CPU_KEY_BLOCK)
        from sglang.srt.model_executor.forward_context import get_attn_backend

        splits = can_split(get_attn_backend(), layer)
        steps = self._by_backend(function, layer, q, k, v, batch, tiles, number, save, splits)
        return steps, _count(batch, tiles, TRITON_KEY_BLOCK) if splits else len(tiles)

    def _tiles(self, batch: Any) -> list[Tile]:
        """How this forward's attention is cut; none: not at all."""
        if batch.extend_prefix_lens_cpu is None or batch.extend_seq_lens_cpu is None:
            return []
        extents = [
            Extent(int(new), int(cached))
            for new, cached in zip(batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu, strict=True)
        ]
        if self._costs.attention_s(extents) <= self._max_blocking_s:
            return []
        max_pairs, least_rows = self._max_blocking_s / self._costs.pair_s, self._costs.least_rows
        return attention_tiles(extents, max_pairs, max(self._granule_rows, least_rows), least_rows)

    def _by_backend(
        self,
        function: Callable[..., Any],
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Any,
        tiles: Sequence[Tile],
        number: int,
        save: bool,
        splits: bool,
    ) -> Steps:
        from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

        out: torch.Tensor | None = None

        def attend(index: int, save: bool, lse: torch.Tensor | None = None, segment: Segment | None = None) -> Any:
            """One tile against the keys of a segment, its own ones, or, without ``lse``, all."""
            rows = _rows(batch, tiles[index])
            part_batch, backend = self._plan(batch, tiles[index], rows, (number, index))
            to = None if out is None or segment is not None else out[rows]
            part_batch._attn_output = to  # backends that can, write there
            call = partial(function, layer, q[rows], k[rows], v[rows], part_batch, save)
            try:
                with forward_context(replace(get_forward_context(), attn_backend=backend)):
                    return call() if lse is None else attend_part(call, backend, lse, segment)
            finally:
                part_batch._attn_output = None  # the plan stays, and must not keep the layer's output

        for index, tile in enumerate(tiles):
            if index:
                yield
            rows = _rows(batch, tile)
            segments = _segments(batch, tile, TRITON_KEY_BLOCK) if splits else []
            lse = q.new_empty((rows.stop - rows.start, layer.tp_q_head_num), dtype=torch.float32) if segments else None
            part = attend(index, save, lse)
            if lse is not None:
                state = part.view(*lse.shape, -1), lse
                for segment in segments:
                    yield
                    lse = torch.empty_like(lse)
                    seen = attend(index, False, lse, segment)
                    state = merge_states(state, (seen.view(state[0].shape), lse))
                part = state[0].view(part.shape)
            if out is None:
                out = part.new_empty((q.shape[0], *part.shape[1:]))
            if part.data_ptr() != out[rows].data_ptr():
                out[rows].view(part.shape).copy_(part)
        return out

    def _plan(self, batch: Any, tile: Tile, rows: slice, key: tuple[int, int]) -> tuple[Any, Any]:
        """The tile's batch and a backend that is planned for it."""
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        backend = self._plans.popitem(last=False)[1][1] if len(self._plans) >= PLANS else self._build()
        part = tile_batch(batch, tile, rows)
        backend.init_forward_metadata(part)
        self._plans[key] = part, backend
        return part, backend


def _is_causal(layer: Any, q: torch.Tensor, batch: Any) -> bool:
    """Whether each row attends to itself and what precedes it, and rows are those of the batch."""
    return bool(
        layer.attn_type.value == "decoder"
        and not layer.is_cross_attention
        and batch.forward_mode.is_extend()
        and batch.spec_info is None
        and q.shape[0] == batch.extend_num_tokens
        and not batch.mha_return_lse
    )


def _rows(batch: Any, tile: Tile) -> slice:
    """The tile's rows among those of the batch: they are consecutive."""
    starts = [0, *accumulate(batch.extend_seq_lens_cpu)]
    return slice(starts[tile[0].request] + tile[0].begin, starts[tile[-1].request] + tile[-1].end)


def _segments(batch: Any, tile: Tile, block: int) -> list[Segment]:
    """Into which parts the keys before a tile are cut; none: it sees all keys at once."""
    if tile[0].key_parts == 1:
        return []
    return key_segments(int(batch.extend_prefix_lens_cpu[tile[0].request]) + tile[0].begin, tile[0].key_parts, block)


def _count(batch: Any, tiles: Sequence[Tile], block: int) -> int:
    """Slices of these tiles."""
    return sum(1 + len(_segments(batch, tile, block)) for tile in tiles)


def tile_batch(batch: Any, tile: Tile, rows: slice) -> Any:
    """A ``ForwardBatch`` of the tile's rows, in which what precedes them in each request is its cached prefix.

    The fields are those that SGLang's two-batch overlap gives to the halves of a batch.
    """
    part = copy(batch)
    requests = slice(tile[0].request, tile[-1].request + 1)
    prefixes = [int(batch.extend_prefix_lens_cpu[piece.request]) + piece.begin for piece in tile]
    lengths = [piece.end - piece.begin for piece in tile]
    ends = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]

    def like(values: list[int], other: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=other.dtype, device=other.device)

    for name in ("input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual"):
        if (value := getattr(batch, name)) is not None:
            setattr(part, name, value[rows])
    if batch.kv_loc_plan is not None:
        part.kv_loc_cols = batch.kv_loc_plan.cols_slice(batch.kv_loc_cols, rows)
    for name in ("req_pool_indices", "req_pool_indices_cpu"):
        if (value := getattr(batch, name)) is not None:
            setattr(part, name, value[requests])
    part.batch_size = len(tile)
    part.seq_lens = like(ends, batch.seq_lens)
    part.seq_lens_cpu = None if batch.seq_lens_cpu is None else like(ends, batch.seq_lens_cpu)
    part.seq_lens_sum = sum(ends)
    part.extend_num_tokens = sum(lengths)
    part.extend_seq_lens_cpu, part.extend_prefix_lens_cpu = lengths, prefixes
    part.extend_seq_lens = like(lengths, batch.extend_seq_lens)
    part.extend_prefix_lens = like(prefixes, batch.extend_prefix_lens)
    part.extend_start_loc = like([0, *accumulate(lengths)][:-1], batch.extend_start_loc)
    part.global_num_token_non_padded_cpu = None
    part.input_embeds = part.mm_inputs = part.residual_stream = None  # large, and not attention's
    part.__dict__.pop(_TILES, None)
    return part


def _native(
    layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Any, tiles: Sequence[Tile], save: bool
) -> Steps:
    """The tiles of torch_native attention."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    pool, table = backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token
    heads_q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
    out = q.new_empty((q.shape[0], layer.tp_q_head_num * layer.v_head_dim))
    heads_out = out.view(-1, layer.tp_q_head_num, layer.v_head_dim)
    k, v = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim), v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
    if save:
        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
    pools = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    starts = [0, *accumulate(batch.extend_seq_lens_cpu)]
    keys_of: dict[int, Keys] = {}
    for index, tile in enumerate(tiles):
        if index:
            yield
        for piece in tile:
            start, cached = starts[piece.request], int(batch.extend_prefix_lens_cpu[piece.request])
            new = int(batch.extend_seq_lens_cpu[piece.request])
            if (keys := keys_of.get(piece.request)) is None:
                if save and not cached and pools[0].dtype == k.dtype == q.dtype:
                    # Without a cached prefix all keys are those that were handed in: no tile need gather them.
                    keys = partial(_handed_in, k[start : start + new], v[start : start + new])
                else:
                    slots = table[batch.req_pool_indices[piece.request]][: cached + new]
                    keys = partial(_gathered, *pools, slots, _run_from(slots), q.dtype)
                keys_of[piece.request] = keys
            rows, first_key = slice(start + piece.begin, start + piece.end), cached + piece.begin
            if not (segments := _segments(batch, tile, CPU_KEY_BLOCK)):
                seen = min(cached + new, -(-(cached + piece.end) // CPU_KEY_BLOCK) * CPU_KEY_BLOCK)
                q_rows, to = heads_q[rows], heads_out[rows]
                attend_rows(q_rows, *keys(0, seen), to, scale=layer.scaling, first_key=first_key)
            else:
                heads_out[rows] = yield from _by_keys(heads_q[rows], keys, first_key, layer.scaling, segments)
    return out


def _handed_in(k: torch.Tensor, v: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    return k[begin:end], v[begin:end]


def _run_from(slots: torch.Tensor) -> int | None:
    """The first of these places in the pool if they follow one another, as they mostly do; None if they do not."""
    first = int(slots[0])
    run = torch.arange(first, first + len(slots), dtype=slots.dtype, device=slots.device)
    return first if torch.equal(slots, run) else None


def _gathered(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    run_from: int | None,
    dtype: torch.dtype,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``run_from``: of ``slots``, of which a run is read where it lies."""
    places = slots[begin:end] if run_from is None else slice(run_from + begin, run_from + end)
    return k_pool[places].to(dtype), v_pool[places].to(dtype)


def _by_keys(
    q: torch.Tensor,
    keys: Keys,
    first_key: int,
    scale: float,
    segments: Sequence[Segment],
) -> Generator[None, None, torch.Tensor]:
    """Few rows against many keys: the rows' own part, then the segments before it, merged one by one."""
    state = attend_segment(q, *keys(first_key, first_key + q.shape[0]), scale=scale, is_diagonal=True)
    for begin, end in segments:
        yield
        state = merge_states(state, attend_segment(q, *keys(begin, end), scale=scale, is_diagonal=False))
    return state[0]
