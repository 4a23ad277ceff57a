"""SGLang's manager of the ``zmq`` KV transfer backend: one rank's end of all its transfers.

SGLang's common connection classes keep the request states, the HTTP bootstrap and the control sockets, and do the
time-outs and the health check of prefill servers; here is what they leave to a backend. What differs between the two
sides is in ``prefill_side`` and ``decode_side``. Made for SGLang 0.5.23.

Threads: the scheduler's thread creates, polls and clears senders and receivers; the *control* thread reads the socket
on which the other side's control messages come; ``PrefillLinks`` or ``DecodeLinks`` run one more. ``update_status`` is
called by all three; a change to Failed passes through the links first, so that whoever sees Failed may free the pages.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zmq
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager, PrefillServerInfo
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_device
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.network import NetworkAddress

from flowprefill_sglang.kernels.kv_pages import map_buffer
from flowprefill_sglang.kv.decode_links import DecodeLinks
from flowprefill_sglang.kv.decode_side import DecodeSide
from flowprefill_sglang.kv.layout import Layout
from flowprefill_sglang.kv.messages import MalformedKvMessage
from flowprefill_sglang.kv.prefill_links import PrefillLinks
from flowprefill_sglang.kv.prefill_side import PrefillSide
from flowprefill_sglang.kv.refusals import refuse_what_is_not_supported
from flowprefill_sglang.kv.settings import settings_from_environment

logger = logging.getLogger(__name__)


class ZmqKVManager(CommonKVManager):
    """One rank's end of all KV transfers: a prefill or a decode side, never both."""

    kv_status_msg_tag = b"KV_STATUS"
    kv_status_msg_carries_reason = True
    reports_transfer_latency = True
    # Prefill never writes to decode's memory: decode's own thread does, and stops before Failed is visible.
    supports_deferred_decode_kv_release = False

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: ServerArgs,
        is_mla_backend: bool | None = False,
    ) -> None:
        refuse_what_is_not_supported(args, server_args)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        settings = settings_from_environment(os.environ)
        device = torch.device(get_device().device)
        if device.type == "cuda":
            device = torch.device("cuda", args.gpu_id)
        buffers = _map_all(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, device)
        aux_buffers = _map_all(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, torch.device("cpu"))
        layout = Layout(
            page_tokens=args.page_size,
            dtype=str(args.kv_cache_dtype_str),
            kv_layout=args.kv_layout,
            page_bytes=tuple(args.kv_item_lens),
            layer_ids=tuple(args.kv_layer_ids or ()),
            aux_bytes=tuple(args.aux_item_lens),
            attn_tp_size=self.attn_tp_size,
            attn_tp_rank=self.attn_tp_rank,
        )
        self.side: PrefillSide | DecodeSide
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.side = PrefillSide(self)
            self.side.links = PrefillLinks(
                name=NetworkAddress(self.local_ip, self.rank_port).to_host_port_str(),
                layout=layout,
                buffers=buffers,
                aux_buffers=aux_buffers,
                settings=settings,
                on_delivered=lambda room: self.update_status(room, KVPoll.Success),
                on_failed=self.side.transfer_failed,
            )
        else:
            self.side = DecodeSide(self, layout)
            self.side.links = DecodeLinks(
                host=self.local_ip,
                layout=layout,
                buffers=buffers,
                aux_buffers=aux_buffers,
                settings=settings,
                on_complete=self.side.transfer_complete,
                on_failed=self.fail_room,
            )
            self._start_heartbeat_checker_thread()
        self._control_thread = threading.Thread(target=self._read_control, name="kv-control", daemon=True)
        self._control_thread.start()

    def teardown(self) -> None:
        """Close all connections and end the threads, with SGLang's own sockets of this manager."""
        self.side.close()
        for monitored, socket in list(self._socket_cache.items()):
            socket.disable_monitor()
            self._monitor_cache[monitored].close(linger=0)
            socket.close(linger=0)
        self._zmq_ctx.term()  # wakes the control thread, which closes the last socket
        self._control_thread.join()

    # ---- request states ---------------------------------------------------------------------------------------

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        """As SGLang's, but a failure first stops all reading from or writing to the room's pages."""
        if status == KVPoll.Failed:
            with self.failure_lock:
                reason = self.failure_records.get(bootstrap_room, "the request was given up")
            self.side.stop(bootstrap_room, reason)
        super().update_status(bootstrap_room, status)

    def fail_room(self, room: int, reason: str) -> None:
        """End a room for this reason; nothing happens to one that SGLang does not know any more."""
        if room in self.request_status:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def forget_failure(self, room: int) -> str | None:
        """Why the room failed, if it did; a later request with this number must not take the reason for its own."""
        with self.failure_lock:
            reason: str | None = self.failure_records.pop(room, None)
        return reason

    # ---- the other side's control messages ---------------------------------------------------------------------

    def _read_control(self) -> None:
        while True:
            try:
                frames: list[bytes] = self.server_socket.recv_multipart()
            except zmq.ContextTerminated:
                self.server_socket.close(linger=0)
                return
            try:
                self.side.handle_control(frames)
            except MalformedKvMessage as error:
                logger.warning("dropped a control message: %s", error)
            except Exception:  # the thread's edge: one bad message must not stop the next
                logger.exception("a KV control message could not be handled")

    # ---- called by SGLang on one side only ----------------------------------------------------------------------

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: npt.NDArray[np.int32],
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,  # a torch.cuda.Event, where there is one
        indices_event: Any = None,
        trace_ctx: object = None,
    ) -> None:
        """Prefill: called by the sender for each run of pages; returns at once. ``state_indices`` is empty: see
        ``refusals``."""
        assert isinstance(self.side, PrefillSide)
        if self.request_status.get(bootstrap_room) in (None, KVPoll.Failed):
            return
        if is_last_chunk and aux_index is None:
            self.fail_room(bootstrap_room, "the last pages came without metadata")
            return
        self.side.links.send(
            bootstrap_room,
            kv_indices,
            first_page=index_slice.start,
            aux_index=aux_index if is_last_chunk else None,
            after=[event for event in (wait_event, indices_event) if event is not None],
        )

    def build_receiver_registration_message(self) -> list[bytes]:
        """Decode: what SGLang sends to a prefill rank before the first room."""
        assert isinstance(self.side, DecodeSide)
        return self.side.registration()

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Decode: as SGLang's, but a prefill server that does not fit fails its own requests.

        SGLang raises into the scheduler's loop here, which ends a decode instance because of one misconfigured prefill.
        """
        assert isinstance(self.side, DecodeSide)
        if bootstrap_addr not in self.prefill_info_table:
            self.side.prefill_refusals.pop(bootstrap_addr, None)
        try:
            return bool(super().try_ensure_parallel_info(bootstrap_addr))
        except (RuntimeError, AssertionError) as error:
            reason = f"prefill server {bootstrap_addr} cannot be used: {error}"
            logger.error("%s", reason)
            self.side.prefill_refusals[bootstrap_addr] = reason
            self.prefill_info_table[bootstrap_addr] = PrefillServerInfo(
                attn_tp_size=1,
                attn_cp_size=1,
                dp_size=1,
                pp_size=1,
                page_size=None,
                kv_cache_dtype=None,
                follow_bootstrap_room=True,
            )
            return True


def _map_all(
    addresses: Sequence[int], lengths: Sequence[int], page_bytes: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    return [map_buffer(*buffer, device) for buffer in zip(addresses, lengths, page_bytes, strict=True)]
