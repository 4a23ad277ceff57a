"""SGLang's per-request objects of the ``zmq`` KV transfer backend, and its registry of prefill ranks.

The scheduler's thread creates, polls and clears senders and receivers; all that outlives a request is in ``manager``.
Made for SGLang 0.5.23.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVReceiver, CommonKVSender

from flowprefill_sglang.kv.decode_side import rank_name
from flowprefill_sglang.kv.manager import ZmqKVManager
from flowprefill_sglang.kv.prefill_side import PrefillSide


class ZmqKVSender(CommonKVSender):
    """One request's transfer on the prefill side."""

    def __init__(
        self, mgr: ZmqKVManager, bootstrap_addr: str, bootstrap_room: int, req_has_disagg_prefill_dp_rank: bool = False
    ) -> None:
        assert isinstance(mgr.side, PrefillSide)
        mgr.side.claim_room(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)

    def clear(self) -> None:
        """The scheduler is about to forget the request, and to free its pages if it has not ended."""
        is_given_up = self.kv_mgr.request_status.get(self.bootstrap_room) not in (None, KVPoll.Success, KVPoll.Failed)
        if is_given_up:
            self.kv_mgr.fail_room(self.bootstrap_room, "prefill gave the request up")
        super().clear()
        if is_given_up:
            self.kv_mgr.forget_failure(self.bootstrap_room)  # nobody will ask for it


class ZmqKVReceiver(CommonKVReceiver):
    """One request's transfer on the decode side."""

    def init(self, prefill_dp_rank: int) -> None:
        """Connect to the request's prefill rank, unless it is one that cannot be served."""
        reason = self.kv_mgr.side.refusal_of(self.bootstrap_addr)
        if reason is not None:
            self._fail(reason)
            return
        self.kv_mgr.side.forget_lost_ranks(self.bootstrap_addr)
        super().init(prefill_dp_rank)

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
        device_kv_indices: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Reserve the pages, then tell the prefill rank that it may begin."""
        if destination != KVTransferDestination.DEVICE or device_kv_indices is not None or aux_index is None:
            raise NotImplementedError("the zmq transfer backend writes to pages of the KV pool only")
        if self.bootstrap_infos is None:
            self._fail(f"prefill server {self.bootstrap_addr} did not say where its ranks are")
            return
        if self.kv_mgr.request_status.get(self.bootstrap_room) in (None, KVPoll.Failed):
            return  # it failed while the scheduler reserved pages; poll() says so
        (info,) = self.bootstrap_infos  # equal TP: one rank
        transfer = self.kv_mgr.side.links.open(
            self.bootstrap_room,
            page_ids=np.asarray(kv_indices, dtype=np.int32),
            aux_index=aux_index,
            prefill=rank_name(info),
        )
        message = self.kv_mgr.side.announcement(
            self.bootstrap_room,
            transfer=transfer,
            pages=len(kv_indices),
            decode_prefix_tokens=decode_prefix_len or 0,
        )
        if not self._send_bootstrap_message(bootstrap_info=info, message=message, operation="send_metadata"):
            self.invalidate_cached_bootstrap_infos()
            return
        self.init_time = time.time()

    def clear(self) -> None:
        """The scheduler is about to forget the request and to use its pages otherwise."""
        self.kv_mgr.side.stop(self.bootstrap_room, "decode gave the request up")
        super().clear()

    def _fail(self, reason: str) -> None:
        self.kv_mgr.fail_room(self.bootstrap_room, reason)
        self.conclude_state = KVPoll.Failed


class ZmqKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own HTTP registry of prefill ranks."""
