"""The ZeroMQ socket wrapper between real sockets."""

from __future__ import annotations

import zmq

from flowprefill_sglang.wire.socket import EventSocket
from flowprefill_testing.stand_ins import in_loop, until


@in_loop
async def test_messages_both_ways_and_many_at_once() -> None:
    context: zmq.Context = zmq.Context()
    bound, connected = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    connected.connect(f"tcp://127.0.0.1:{port}")
    at_router: list[list[bytes]] = []
    at_dealer: list[list[bytes]] = []
    router = EventSocket(bound, at_router.append)
    dealer = EventSocket(connected, at_dealer.append)
    count = 1000
    for number in range(count):
        assert dealer.try_send([b"%d" % number, b"x" * number])
    await until(lambda: len(at_router) == count)
    assert [frames[1] for frames in at_router] == [b"%d" % number for number in range(count)]
    link = at_router[0][0]
    for number in range(count):
        assert router.try_send([link, b"%d" % number])
    await until(lambda: len(at_dealer) == count)
    assert not router.try_send([b"nobody", b"x"])
    router.close()
    router.close()
    dealer.close()
    context.term()


@in_loop
async def test_a_handler_may_answer_and_close() -> None:
    context: zmq.Context = zmq.Context()
    bound, connected = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    connected.connect(f"tcp://127.0.0.1:{port}")
    heard: list[list[bytes]] = []
    router = EventSocket(bound, lambda frames: router.try_send(frames))

    def on_answer(frames: list[bytes]) -> None:
        heard.append(frames)
        dealer.close()

    dealer = EventSocket(connected, on_answer)
    dealer.try_send([b"a"])
    dealer.try_send([b"b"])
    await until(lambda: heard)
    assert heard == [[b"a"]]
    router.close()
    context.term()
