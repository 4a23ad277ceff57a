"""SGLang's side of the ``zmq`` KV transfer backend: its manager, sender, receiver and bootstrap server.

SGLang's common connection classes keep the request states, the HTTP bootstrap and the control sockets, and do the
time-outs and the health check of prefill servers; here is what they leave to a backend. Made for SGLang 0.5.23.

Threads: the scheduler's thread creates, polls and clears senders and receivers; the *control* thread reads the socket
on which the other side's control messages come; ``PrefillLinks`` or ``DecodeLinks`` run one more. ``update_status`` is
called by all three; a change to Failed passes through the links first, so that whoever sees Failed may free the pages.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import zmq
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import ABORT_TAG as _ABORT_TAG
from sglang.srt.disaggregation.common.conn import (
    AbortNotification,
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
    PrefillServerInfo,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_device, get_parallel
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.network import NetworkAddress

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.kernels.kv_pages import map_buffer
from flowprefill_sglang.kv.decode_links import DecodeLinks
from flowprefill_sglang.kv.layout import Layout
from flowprefill_sglang.kv.messages import (
    CONTROL_TAG,
    PROTOCOL_VERSION,
    Announce,
    MalformedKvMessage,
    Register,
    decode_control,
    encode,
)
from flowprefill_sglang.kv.prefill_links import PrefillLinks
from flowprefill_sglang.kv.settings import settings_from_environment

logger = logging.getLogger(__name__)

_REMEMBERED_FAILURES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class _Destination:
    """What SGLang's common classes read from the entries of ``transfer_infos``."""

    endpoint: str
    dst_port: int
    required_dst_info_num: int = 1
    is_dummy: bool = False


class ZmqKVManager(CommonKVManager):
    """One rank's end of all KV transfers."""

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
        _refuse_what_is_not_supported(args, server_args)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        settings = settings_from_environment(os.environ)
        device = torch.device(get_device().device)
        if device.type == "cuda":
            device = torch.device("cuda", args.gpu_id)
        buffers = _map_all(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, device)
        aux_buffers = _map_all(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, torch.device("cpu"))
        self.layout = Layout(
            page_tokens=args.page_size,
            dtype=str(args.kv_cache_dtype_str),
            kv_layout=args.kv_layout,
            page_bytes=tuple(args.kv_item_lens),
            layer_ids=tuple(args.kv_layer_ids or ()),
            aux_bytes=tuple(args.aux_item_lens),
            attn_tp_size=self.attn_tp_size,
            attn_tp_rank=self.attn_tp_rank,
        )
        self.name = NetworkAddress(self.local_ip, self.rank_port).to_host_port_str()
        self.prefill_refusals: dict[str, str] = {}
        self._failed_rooms: OrderedDict[int, str] = OrderedDict()
        self._unclaimed_rooms: OrderedDict[int, float] = OrderedDict()
        self._rooms_lock = threading.Lock()  # of the two tables above
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.prefill_links = PrefillLinks(
                name=self.name,
                layout=self.layout,
                buffers=buffers,
                aux_buffers=aux_buffers,
                settings=settings,
                on_delivered=lambda room: self.update_status(room, KVPoll.Success),
                on_failed=self._transfer_failed,
            )
        else:
            self.decode_links = DecodeLinks(
                host=self.local_ip,
                layout=self.layout,
                buffers=buffers,
                aux_buffers=aux_buffers,
                settings=settings,
                on_complete=self._transfer_complete,
                on_failed=self._fail_room,
            )
            self._start_heartbeat_checker_thread()
        self._control_thread = threading.Thread(target=self._read_control, name="kv-control", daemon=True)
        self._control_thread.start()

    @property
    def is_prefill(self) -> bool:
        """Which of the two sides this is."""
        return bool(self.disaggregation_mode == DisaggregationMode.PREFILL)

    def teardown(self) -> None:
        """Close all connections and end the threads, with SGLang's own sockets of this manager."""
        if self.is_prefill:
            self.prefill_links.close()
        else:
            self._heartbeat_shutdown.set()
            self.decode_links.shut_down()
            CommonKVReceiver.close_all_sockets()
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
            if not self.is_prefill:
                self.decode_links.close(bootstrap_room, reason)
            elif bootstrap_room in self.request_status:
                with self._rooms_lock:
                    self._failed_rooms[bootstrap_room] = reason
                    if len(self._failed_rooms) > _REMEMBERED_FAILURES:
                        self._failed_rooms.popitem(last=False)
                self.prefill_links.cancel(bootstrap_room, reason)
        super().update_status(bootstrap_room, status)

    def _fail_room(self, room: int, reason: str) -> None:
        if room in self.request_status:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def _transfer_complete(self, room: int) -> None:
        # With equal TP and nothing else in parallel, one prefill rank serves this one, and has the same number.
        self.apply_prefill_status(
            bootstrap_room=room, status=KVPoll.Success, prefill_rank=self._prefill_unique_rank(), failure_reason=None
        )

    def _transfer_failed(self, room: int, reason: str, announce: Announce) -> None:
        """A room has failed on the prefill side: by its own or the scheduler's doing. Decode hears of it either way."""
        with self.failure_lock:
            reason = self.failure_records.get(room, reason)  # the first cause
        self._tell_decode_failed(room, reason, announce)
        self._fail_room(room, reason)

    def _tell_decode_failed(self, room: int, reason: str, announce: Announce) -> None:
        self.send_kv_status_message(
            targets=[(announce.host, announce.control_port)],
            bootstrap_room=room,
            status=KVPoll.Failed,
            failure_reason=reason,
        )

    # ---- control messages, prefill side ------------------------------------------------------------------------

    def _read_control(self) -> None:
        while True:
            try:
                frames: list[bytes] = self.server_socket.recv_multipart()
            except zmq.ContextTerminated:
                self.server_socket.close(linger=0)
                return
            try:
                if self.is_prefill:
                    self._handle_decode_message(frames)
                else:
                    self._handle_prefill_message(frames)
            except MalformedKvMessage as error:
                logger.warning("dropped a control message: %s", error)
            except Exception:  # the thread's edge: one bad message must not stop the next
                logger.exception("a KV control message could not be handled")

    def _handle_decode_message(self, frames: list[bytes]) -> None:
        if frames and frames[0] == _ABORT_TAG:
            notification = AbortNotification.from_zmq(frames)
            # No ABORT_ACK: decode waits for one only where prefill writes to its memory.
            if notification is not None and self.request_status.get(notification.room) not in (None, KVPoll.Success):
                self._fail_room(notification.room, "decode aborted the request")
            return
        message = decode_control(frames)
        if isinstance(message, Register):
            self.prefill_links.register(message)
        elif isinstance(message, Announce):
            self._announced(message)
        else:
            raise MalformedKvMessage(f"{len(frames)} frames that are no control message")

    def _announced(self, announce: Announce) -> None:
        room = announce.room
        self._forget_unclaimed_rooms()
        with self._rooms_lock:
            reason = self._failed_rooms.get(room)
        if reason is not None:
            self._tell_decode_failed(room, reason, announce)
            return
        if room not in self.request_status:
            with self._rooms_lock:
                self._unclaimed_rooms[room] = time.monotonic()
        self.transfer_infos[room] = {
            announce.session: _Destination(endpoint=announce.host, dst_port=announce.control_port)
        }
        self.resolve_kv_replica_factor(self.transfer_infos[room])
        self.req_to_decode_prefix_len[room] = announce.decode_prefix_tokens
        self.prefill_links.announce(announce)
        self.update_status(room, KVPoll.WaitingForInput)

    def claim_room(self, room: int) -> None:
        """A sender exists for the room from now on; a failure of an earlier request with this number is forgotten."""
        with self._rooms_lock:
            self._unclaimed_rooms.pop(room, None)
            self._failed_rooms.pop(room, None)

    def _forget_unclaimed_rooms(self) -> None:
        """Rooms that decode announced for a request that never came here: SGLang would keep them for ever."""
        oldest_at = time.monotonic() - self.bootstrap_timeout
        while True:
            with self._rooms_lock:
                room, announced_at = next(iter(self._unclaimed_rooms.items()), (None, 0.0))
                if room is None or announced_at > oldest_at:
                    return
                del self._unclaimed_rooms[room]
            self._fail_room(room, "the request never reached this prefill server")
            self.request_status.pop(room, None)
            self.transfer_infos.pop(room, None)
            self.req_to_decode_prefix_len.pop(room, None)

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
        """Called by the sender for each run of pages; returns at once. ``state_indices`` is empty: see the refusals."""
        if self.request_status.get(bootstrap_room) in (None, KVPoll.Failed):
            return
        if is_last_chunk and aux_index is None:
            self._fail_room(bootstrap_room, "the last pages came without metadata")
            return
        self.prefill_links.send(
            bootstrap_room,
            kv_indices,
            first_page=index_slice.start,
            aux_index=aux_index if is_last_chunk else None,
            after=[event for event in (wait_event, indices_event) if event is not None],
        )

    # ---- control messages, decode side -------------------------------------------------------------------------

    def _handle_prefill_message(self, frames: list[bytes]) -> None:
        if self.handle_abort_ack_message(frames):
            return
        parsed = self.parse_kv_status_message(frames)
        if parsed is None:
            raise MalformedKvMessage(f"{len(frames)} frames that are no status message")
        room, status, prefill_rank, reason = parsed
        if status == KVPoll.Success:
            raise MalformedKvMessage("a status message that says Success, which is for this side to say")
        self.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=prefill_rank, failure_reason=reason)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but a prefill server that does not fit fails its own requests.

        SGLang raises into the scheduler's loop here, which ends a decode instance because of one misconfigured prefill.
        """
        if bootstrap_addr not in self.prefill_info_table:
            self.prefill_refusals.pop(bootstrap_addr, None)
        try:
            return bool(super().try_ensure_parallel_info(bootstrap_addr))
        except (RuntimeError, AssertionError) as error:
            reason = f"prefill server {bootstrap_addr} cannot be used: {error}"
            logger.error("%s", reason)
            self.prefill_refusals[bootstrap_addr] = reason
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

    def refusal_of(self, bootstrap_addr: str) -> str | None:
        """Why requests of this prefill server cannot be served, or None."""
        info = self.prefill_info_table.get(bootstrap_addr)
        if bootstrap_addr in self.prefill_refusals or info is None:
            return self.prefill_refusals.get(bootstrap_addr)
        different = [
            f"{what} is {theirs} there and {ours} here"
            for what, theirs, ours in (
                ("attention tensor parallelism", info.attn_tp_size, self.attn_tp_size),
                ("context parallelism", info.attn_cp_size, 1),
                ("pipeline parallelism", info.pp_size, 1),
            )
            if theirs != ours
        ]
        if info.enable_kv_cache_sharding or info.enable_dsa_cache_layer_split:
            different.append("its KV cache is sharded between ranks")
        if not different:
            return None
        return (
            f"prefill server {bootstrap_addr} cannot be used with the zmq transfer backend: {', '.join(different)}; "
            f"start both sides alike, or with --disaggregation-transfer-backend mooncake or nixl"
        )

    def build_receiver_registration_message(self) -> list[bytes]:
        """What SGLang sends to a prefill rank before the first room."""
        message = Register(
            protocol=PROTOCOL_VERSION,
            session=self.decode_links.session,
            host=self.local_ip,
            control_port=self.rank_port,
            link_port=self.decode_links.port,
            max_chunk_bytes=self.decode_links.max_chunk_bytes,
            layout=self.layout,
        )
        return [CONTROL_TAG, encode(message)]

    def announcement(self, room: int, transfer: int, pages: int, decode_prefix_tokens: int) -> list[bytes]:
        """The message that lets a prefill rank begin."""
        message = Announce(
            session=self.decode_links.session,
            host=self.local_ip,
            control_port=self.rank_port,
            room=room,
            transfer=transfer,
            pages=pages,
            decode_prefix_tokens=decode_prefix_tokens,
        )
        return [CONTROL_TAG, encode(message)]


def _map_all(
    addresses: Sequence[int], lengths: Sequence[int], page_bytes: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    return [map_buffer(*buffer, device) for buffer in zip(addresses, lengths, page_bytes, strict=True)]
