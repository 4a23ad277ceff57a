"""Managers, senders and receivers on SGLang's real common classes: both sides in one process, with real sockets."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowprefill_testing.kv_link_pair import wait_until

pytest.importorskip("sglang", reason="needs sglang")

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_testing.kv_managers import RankMemory, sglang_context

warnings.filterwarnings("ignore", module="sglang")


class Cluster:
    """One prefill and one decode rank."""

    def __init__(self, server_args: Any, bootstrap_port: int) -> None:
        from sglang.srt.disaggregation.base.conn import KVPoll
        from sglang.srt.disaggregation.utils import DisaggregationMode, KVClassType, TransferBackend, get_kv_class

        self.poll = KVPoll
        self.address = f"127.0.0.1:{bootstrap_port}"
        backend = TransferBackend("zmq")
        self._manager, self._sender, self._receiver, server = (
            get_kv_class(backend, kind)
            for kind in (
                KVClassType.MANAGER,
                KVClassType.SENDER,
                KVClassType.RECEIVER,
                KVClassType.BOOTSTRAP_SERVER,
            )
        )
        self.server = server("127.0.0.1", bootstrap_port)
        self._server_args = server_args
        self._modes = DisaggregationMode
        self.prefill_memory, self.prefill = self.make(DisaggregationMode.PREFILL)
        self.decode_memory, self.decode = self.make(DisaggregationMode.DECODE)
        random = np.random.default_rng(0)
        for array in (*self.prefill_memory.kv, *self.prefill_memory.aux):
            array[:] = random.integers(1, 255, array.shape)

    def make(self, mode: Any, **changes: Any) -> tuple[RankMemory, Any]:
        shape = {"page_bytes": [64, 64], "pages": 40, "aux_bytes": [64, 8], "requests": 4, "page_tokens": 1} | changes
        memory = RankMemory(**shape)
        return memory, self._manager(memory.args, mode, self._server_args)

    def receiver(self, room: int) -> Any:
        receiver = self._receiver(self.decode, self.address, room)
        wait_until(lambda: self.decode.try_ensure_parallel_info(self.address), "the bootstrap server")
        receiver.init(0)
        return receiver

    def sender(self, room: int, pages: int) -> Any:
        sender = self._sender(self.prefill, self.address, room)
        sender.init(pages, 2)
        return sender


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    (port,) = free_ports(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sglang_context(port) as server_args:
            made = Cluster(server_args, port)
            yield made
            made.prefill.teardown()
            made.decode.teardown()
            made.server.close()


def reason_of(side: Any) -> str:
    from sglang.srt.disaggregation.common.conn import KVTransferError

    with pytest.raises(KVTransferError) as caught:
        side.failure_exception()
    return str(caught.value)


def test_a_request_is_handed_over_in_two_chunks(cluster: Cluster) -> None:
    sender, receiver = cluster.sender(1, 5), cluster.receiver(1)
    assert receiver.poll() == cluster.poll.WaitingForInput
    target = np.array([9, 3, 11, 12, 13], np.int32)
    receiver.send_metadata(target, 1, [], decode_prefix_len=7)
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    assert sender.pop_decode_prefix_len() == 7
    sender.send(np.array([0, 1, 2], np.int32))
    assert receiver.poll() == cluster.poll.WaitingForInput
    sender.send(np.array([5, 6], np.int32))
    wait_until(lambda: receiver.poll() == cluster.poll.Success, "the transfer")
    for ours, theirs in zip(cluster.decode_memory.kv, cluster.prefill_memory.kv, strict=True):
        assert np.array_equal(ours[target], theirs[[0, 1, 2, 5, 6]])
    for ours, theirs in zip(cluster.decode_memory.aux, cluster.prefill_memory.aux, strict=True):
        assert np.array_equal(ours[1], theirs[2])
    wait_until(lambda: sender.poll() == cluster.poll.Success, "the acknowledgement")
    metric = sender.get_transfer_metric()
    assert metric.transfer_total_bytes == 5 * 128
    sender.clear()
    receiver.clear()
    assert not cluster.prefill.transfer_infos
    assert not cluster.prefill.request_status
    assert not cluster.decode.request_status


def test_decode_may_be_first(cluster: Cluster) -> None:
    receiver = cluster.receiver(2)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    wait_until(lambda: 2 in cluster.prefill.request_status, "the announcement")
    sender = cluster.sender(2, 1)
    assert sender.poll() == cluster.poll.WaitingForInput
    sender.send(np.array([4], np.int32))
    wait_until(lambda: receiver.poll() == cluster.poll.Success, "the transfer")
    wait_until(lambda: sender.poll() == cluster.poll.Success, "the acknowledgement")
    sender.clear()
    receiver.clear()


def test_an_abort_on_the_prefill_side_reaches_decode(cluster: Cluster) -> None:
    sender, receiver = cluster.sender(3, 2), cluster.receiver(3)
    receiver.send_metadata(np.array([1, 2], np.int32), 0, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    sender.send(np.array([4], np.int32))
    sender.abort()
    assert sender.poll() == cluster.poll.Failed
    wait_until(lambda: receiver.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    assert "Aborted by AbortReq" in reason_of(receiver)
    assert "Aborted by AbortReq" in reason_of(sender)


def test_an_abort_before_decode_came_is_remembered(cluster: Cluster) -> None:
    sender = cluster.sender(4, 2)
    sender.abort()
    reason_of(sender)
    receiver = cluster.receiver(4)
    receiver.send_metadata(np.array([1, 2], np.int32), 0, [])
    wait_until(lambda: receiver.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    assert "Aborted by AbortReq" in reason_of(receiver)


def test_an_abort_on_the_decode_side_reaches_prefill(cluster: Cluster) -> None:
    sender, receiver = cluster.sender(5, 2), cluster.receiver(5)
    receiver.send_metadata(np.array([1, 2], np.int32), 0, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    receiver.abort()
    wait_until(lambda: sender.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    reason = reason_of(sender)
    assert "decode" in reason or "Aborted" in reason
    reason_of(receiver)


def test_no_write_once_decode_sees_failed(cluster: Cluster) -> None:
    sender, receiver = cluster.sender(6, 2), cluster.receiver(6)
    receiver.send_metadata(np.array([20, 21], np.int32), 3, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    cluster.decode.record_failure(6, "timed out")
    cluster.decode.update_status(6, cluster.poll.Failed)
    sender.send(np.array([4, 5], np.int32))
    wait_until(lambda: sender.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    assert not cluster.decode_memory.kv[0][[20, 21]].any()
    assert not cluster.decode_memory.aux[0][3].any()
    assert "timed out" in reason_of(sender)
    assert "timed out" in reason_of(receiver)


def test_a_prefill_with_another_width_is_refused_per_request(cluster: Cluster) -> None:
    info = cluster.decode.prefill_info_table[cluster.address]
    width, info.attn_tp_size = info.attn_tp_size, 2
    try:
        receiver = cluster.receiver(7)
        assert receiver.poll() == cluster.poll.Failed
        assert "attention tensor parallelism is 2 there and 1 here" in reason_of(receiver)
    finally:
        info.attn_tp_size = width


def test_a_prefill_with_another_page_size_does_not_end_the_decode_server(cluster: Cluster) -> None:
    cluster.decode.prefill_info_table.pop(cluster.address)
    cluster.decode.kv_args.page_size = 16
    try:
        receiver = cluster.receiver(8)
        assert receiver.poll() == cluster.poll.Failed
        assert "--page-size" in reason_of(receiver)
    finally:
        cluster.decode.kv_args.page_size = 1
        cluster.decode.prefill_info_table.pop(cluster.address)
    receiver = cluster.receiver(9)
    assert receiver.poll() == cluster.poll.WaitingForInput
    receiver.abort()
    reason_of(receiver)


@pytest.mark.parametrize("frames", [[b"junk"], [b"FLOWPREFILL_KV", b"junk"], [b"ABORT"], [b"KV_STATUS", b"x"], [b""]])
def test_junk_on_the_control_sockets_changes_nothing(cluster: Cluster, frames: list[bytes]) -> None:
    import zmq

    with zmq.Context() as context:
        for manager in (cluster.prefill, cluster.decode):
            with context.socket(zmq.PUSH) as socket:
                socket.connect(f"tcp://{manager.local_ip}:{manager.rank_port}")
                socket.send_multipart(frames)
    room = 100 + len(frames[0]) + len(frames)
    sender, receiver = cluster.sender(room, 1), cluster.receiver(room)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    sender.send(np.array([4], np.int32))
    wait_until(lambda: receiver.poll() == cluster.poll.Success, "the transfer")
    wait_until(lambda: sender.poll() == cluster.poll.Success, "the acknowledgement")
    sender.clear()
    receiver.clear()


def hand_over(cluster: Cluster, room: int) -> None:
    sender, receiver = cluster.sender(room, 1), cluster.receiver(room)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    sender.send(np.array([4], np.int32))
    wait_until(lambda: receiver.poll() == cluster.poll.Success, "the transfer")
    wait_until(lambda: sender.poll() == cluster.poll.Success, "the acknowledgement")
    sender.clear()
    receiver.clear()


def test_an_abort_while_decode_announces_reaches_decode(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    is_announced, may_go_on = threading.Event(), threading.Event()

    def resolve(_: object) -> None:
        is_announced.set()
        assert may_go_on.wait(20)

    sender, receiver = cluster.sender(200, 1), cluster.receiver(200)
    monkeypatch.setattr(cluster.prefill, "resolve_kv_replica_factor", resolve)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    assert is_announced.wait(20)
    aborting = threading.Thread(target=sender.abort)
    aborting.start()
    aborting.join(0.2)  # the order that loses, where the two steps are not one: abort first, announcement after it
    may_go_on.set()
    aborting.join(20)
    wait_until(lambda: receiver.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    assert "Aborted by AbortReq" in reason_of(receiver)
    assert "Aborted by AbortReq" in reason_of(sender)


def test_requests_that_are_given_up_leave_nothing_behind(cluster: Cluster) -> None:
    for room in range(210, 230):
        cluster.sender(room, 1).clear()
    assert not cluster.prefill.failure_records
    assert not cluster.prefill.request_status


def test_rooms_of_requests_that_never_came_leave_nothing_behind(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = cluster.receiver(230)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    wait_until(lambda: 230 in cluster.prefill.request_status, "the announcement")
    monkeypatch.setattr(cluster.prefill, "bootstrap_timeout", 0)
    next_one = cluster.receiver(231)
    next_one.send_metadata(np.array([2], np.int32), 1, [])  # an announcement is when they are looked through
    wait_until(lambda: receiver.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    assert "never reached this prefill server" in reason_of(receiver)
    for table in ("request_status", "transfer_infos", "req_to_decode_prefix_len", "failure_records"):
        assert 230 not in getattr(cluster.prefill, table), table
    next_one.abort()
    reason_of(next_one)


def test_telling_a_decode_that_does_not_listen_holds_up_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    tell = cluster.prefill.send_kv_status_message

    def blocked(**arguments: object) -> None:
        assert may_go_on.wait(30)
        tell(**arguments)

    sender, receiver = cluster.sender(240, 1), cluster.receiver(240)
    receiver.send_metadata(np.array([1], np.int32), 0, [])
    wait_until(lambda: sender.poll() == cluster.poll.WaitingForInput, "the announcement")
    monkeypatch.setattr(cluster.prefill, "send_kv_status_message", blocked)
    sender.abort()
    try:
        hand_over(cluster, 241)
    finally:
        may_go_on.set()
    wait_until(lambda: receiver.poll() == cluster.poll.Failed, "the failure", timeout_s=3)
    reason_of(sender)
    reason_of(receiver)


def test_a_prefill_that_was_restarted_is_looked_up_again(cluster: Cluster) -> None:
    hand_over(cluster, 250)
    (known,) = cluster.decode.connection_pool.values()
    (known[0]["rank_port"],) = free_ports(1)  # where it was before
    hand_over(cluster, 251)


def test_models_with_other_state_are_refused_at_start(cluster: Cluster) -> None:
    from sglang.srt.disaggregation.base.conn import StateType
    from sglang.srt.disaggregation.utils import DisaggregationMode

    from flowprefill_sglang.errors import StartupError

    memory = RankMemory(page_bytes=[64], pages=4, aux_bytes=[8], requests=1, page_tokens=1)
    memory.args.state_types = [StateType.SWA]
    with pytest.raises(StartupError, match=r"state beside the KV cache \(swa\); use .* mooncake or nixl"):
        cluster._manager(memory.args, DisaggregationMode.DECODE, cluster._server_args)
