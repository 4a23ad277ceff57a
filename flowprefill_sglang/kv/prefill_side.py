"""What a prefill rank knows of rooms beside SGLang's own tables: announced by decode, claimed by a sender, failed.

Decode's announcement and the request itself reach a prefill rank by different ways, in any order, and either may never
come. ``_lock`` makes "has the room failed, and if not, let it begin" one step against "the room has failed".
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification, CommonKVManager

from flowprefill_sglang.kv.messages import Announce, MalformedKvMessage, Register, decode_control
from flowprefill_sglang.kv.prefill_links import PrefillLinks

logger = logging.getLogger(__name__)

_REMEMBERED_FAILURES: Final = 4096
_WAITING_NOTICES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class _Destination:
    """What SGLang's common classes read from the entries of ``transfer_infos``."""

    endpoint: str
    dst_port: int
    required_dst_info_num: int = 1
    is_dummy: bool = False


@dataclass(frozen=True, kw_only=True)
class _Notice:
    host: str
    control_port: int
    room: int
    reason: str


class PrefillSide:
    """The prefill half of a manager. A thread of its own tells decode ranks of failures: SGLang's status sockets can
    block for 30 s on a decode rank that has vanished, and neither KV nor announcements of others may wait for that."""

    links: PrefillLinks

    def __init__(self, manager: CommonKVManager) -> None:
        self._manager = manager
        self._failed_rooms: OrderedDict[int, str] = OrderedDict()
        self._unclaimed_rooms: OrderedDict[int, float] = OrderedDict()
        self._lock = threading.RLock()  # of the two tables above, and of the order in which the links hear of a room
        self._notices: queue.Queue[_Notice | None] = queue.Queue(_WAITING_NOTICES)
        self._notice_thread = threading.Thread(target=self._tell_decode, name="kv-failure-notices", daemon=True)
        self._notice_thread.start()

    def close(self) -> None:
        """Fail what is in flight, close all connections and end the threads."""
        self.links.close()
        self._notices.put(None)
        self._notice_thread.join()

    def stop(self, room: int, reason: str) -> None:
        """The room has failed: nothing is read from its pages any more, and decode will hear of it, whenever it
        announces the room."""
        with self._lock:
            if room not in self._manager.request_status:
                return
            self._failed_rooms[room] = reason
            if len(self._failed_rooms) > _REMEMBERED_FAILURES:
                self._failed_rooms.popitem(last=False)
            self.links.cancel(room, reason)

    def claim_room(self, room: int) -> None:
        """A sender exists for the room from now on; a failure of an earlier request with this number is forgotten."""
        with self._lock:
            self._unclaimed_rooms.pop(room, None)
            self._failed_rooms.pop(room, None)
            self._manager.update_status(room, KVPoll.Bootstrapping)

    def transfer_failed(self, room: int, reason: str, announce: Announce) -> None:
        """A room has failed: by its links' or the scheduler's doing. Decode hears of it either way."""
        with self._manager.failure_lock:
            reason = self._manager.failure_records.get(room, reason)  # the first cause
        self._notify(announce, reason)
        self._manager.fail_room(room, reason)

    def handle_control(self, frames: list[bytes]) -> None:
        """A message of a decode rank, or SGLang's abort. Raises MalformedKvMessage."""
        if frames and frames[0] == ABORT_TAG:
            abort = AbortNotification.from_zmq(frames)
            # No ABORT_ACK: decode waits for one only where prefill writes to its memory.
            if abort is not None and self._manager.request_status.get(abort.room) not in (None, KVPoll.Success):
                self._manager.fail_room(abort.room, "decode aborted the request")
            return
        message = decode_control(frames)
        if isinstance(message, Register):
            self.links.register(message)
        elif isinstance(message, Announce):
            self._forget_unclaimed_rooms()
            self._announced(message)
        else:
            raise MalformedKvMessage(f"{len(frames)} frames that are no control message")

    def _announced(self, announce: Announce) -> None:
        room, manager = announce.room, self._manager
        with self._lock:
            reason = self._failed_rooms.get(room)
            if reason is not None:
                self._notify(announce, reason)
                return
            if room not in manager.request_status:
                self._unclaimed_rooms[room] = time.monotonic()
            manager.transfer_infos[room] = {
                announce.session: _Destination(endpoint=announce.host, dst_port=announce.control_port)
            }
            manager.resolve_kv_replica_factor(manager.transfer_infos[room])
            manager.req_to_decode_prefix_len[room] = announce.decode_prefix_tokens
            self.links.announce(announce)
            manager.update_status(room, KVPoll.WaitingForInput)

    def _forget_unclaimed_rooms(self) -> None:
        """Rooms that decode announced for a request that never came here: SGLang would keep them for ever."""
        oldest_at = time.monotonic() - self._manager.bootstrap_timeout
        with self._lock:
            while self._unclaimed_rooms:
                room, announced_at = next(iter(self._unclaimed_rooms.items()))
                if announced_at > oldest_at:
                    return
                del self._unclaimed_rooms[room]
                self._manager.fail_room(room, "the request never reached this prefill server")
                self._manager.request_status.pop(room, None)
                self._manager.transfer_infos.pop(room, None)
                self._manager.req_to_decode_prefix_len.pop(room, None)
                self._manager.forget_failure(room)

    # ---- telling decode ---------------------------------------------------------------------------------------

    def _notify(self, announce: Announce, reason: str) -> None:
        notice = _Notice(host=announce.host, control_port=announce.control_port, room=announce.room, reason=reason)
        try:
            self._notices.put_nowait(notice)
        except queue.Full:  # decode's own time-out ends the room
            logger.error("decode was not told of a failed room, too many wait to be told: %s", notice)

    def _tell_decode(self) -> None:
        while (notice := self._notices.get()) is not None:
            self._manager.send_kv_status_message(
                targets=[(notice.host, notice.control_port)],
                bootstrap_room=notice.room,
                status=KVPoll.Failed,
                failure_reason=notice.reason,
            )
