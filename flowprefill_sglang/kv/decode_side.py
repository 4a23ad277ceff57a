"""What a decode rank says to prefill ranks over SGLang's control sockets, and what it makes of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager, CommonKVReceiver
from sglang.srt.utils.network import NetworkAddress

from flowprefill_sglang import __version__
from flowprefill_sglang.kv.decode_links import DecodeLinks
from flowprefill_sglang.kv.layout import Layout
from flowprefill_sglang.kv.messages import (
    CONTROL_TAG,
    SPOKEN,
    Announce,
    MalformedKvMessage,
    Register,
    encode,
)
from flowprefill_sglang.kv.refusals import peer_mismatch


class DecodeSide:
    """The decode half of a manager."""

    links: DecodeLinks

    def __init__(self, manager: CommonKVManager, layout: Layout) -> None:
        self._manager = manager
        self._layout = layout
        self.prefill_refusals: dict[str, str] = {}
        """By bootstrap address: why SGLang's own checks refuse the prefill server."""

    def close(self) -> None:
        """Fail what is in flight, close all connections and end the threads."""
        self._manager._heartbeat_shutdown.set()
        self.links.shut_down()
        CommonKVReceiver.close_all_sockets()

    def stop(self, room: int, reason: str) -> None:
        """The room has failed: nothing is written to its pages any more."""
        self.links.close(room, reason)

    def transfer_complete(self, room: int) -> None:
        """Everything of the room is in its place."""
        # With equal TP and nothing else in parallel, one prefill rank serves this one, and has the same number.
        self._manager.apply_prefill_status(
            bootstrap_room=room,
            status=KVPoll.Success,
            prefill_rank=self._manager._prefill_unique_rank(),
            failure_reason=None,
        )

    def handle_control(self, frames: list[bytes]) -> None:
        """A status message of a prefill rank. Raises MalformedKvMessage."""
        if self._manager.handle_abort_ack_message(frames):
            return
        parsed = self._manager.parse_kv_status_message(frames)
        if parsed is None:
            raise MalformedKvMessage(f"{len(frames)} frames that are no status message")
        room, status, prefill_rank, reason = parsed
        if status == KVPoll.Success:
            raise MalformedKvMessage("a status message that says Success, which is for this side to say")
        self._manager.apply_prefill_status(
            bootstrap_room=room, status=status, prefill_rank=prefill_rank, failure_reason=reason
        )

    def refusal_of(self, bootstrap_addr: str) -> str | None:
        """Why requests of this prefill server cannot be served, or None."""
        info = self._manager.prefill_info_table.get(bootstrap_addr)
        if bootstrap_addr in self.prefill_refusals or info is None:
            return self.prefill_refusals.get(bootstrap_addr)
        mismatch = peer_mismatch(info, attn_tp_size=self._manager.attn_tp_size)
        return None if mismatch is None else f"prefill server {bootstrap_addr} {mismatch}"

    def forget_lost_ranks(self, bootstrap_addr: str) -> None:
        """Have SGLang look up and register with this server's ranks again where there is no link to them.

        SGLang does so once, and again when its health check has missed a server several times. One that was restarted
        in between has other ports and knows no decode session: its requests would wait for their time-out.
        """
        with self._manager.connection_lock:
            pool: dict[str, list[dict[str, Any]]] = self._manager.connection_pool
            for key in [key for key in pool if key.startswith(f"{bootstrap_addr}_")]:
                if not all(self.links.is_linked(rank_name(rank)) for rank in pool[key]):
                    del pool[key]

    def registration(self) -> list[bytes]:
        """What makes this rank known to a prefill rank; saying it twice does no harm."""
        message = Register(
            protocol=SPOKEN.newest,
            oldest_protocol=SPOKEN.oldest,
            version=__version__,
            session=self.links.session,
            host=self._manager.local_ip,
            control_port=self._manager.rank_port,
            link_port=self.links.port,
            max_chunk_bytes=self.links.max_chunk_bytes,
            layout=self._layout,
        )
        return [CONTROL_TAG, encode(message)]

    def announcement(self, room: int, *, transfer: int, pages: int, decode_prefix_tokens: int) -> list[bytes]:
        """The message that lets a prefill rank begin."""
        message = Announce(
            session=self.links.session,
            host=self._manager.local_ip,
            control_port=self._manager.rank_port,
            room=room,
            transfer=transfer,
            pages=pages,
            decode_prefix_tokens=decode_prefix_tokens,
        )
        return [CONTROL_TAG, encode(message)]


def rank_name(rank: Mapping[str, Any]) -> str:
    """``host:port`` of a prefill rank, from SGLang's bootstrap information."""
    return str(NetworkAddress(rank["rank_ip"], int(rank["rank_port"])).to_host_port_str())
