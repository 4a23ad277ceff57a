"""The link against a real ZeroMQ ROUTER socket and an engine made of plain Python."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.link import Link, SchedulerHangs, names
from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter
from flowprefill_sglang.wire.framing import decode_from_worker, encode
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Answer,
    Dispatch,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Limits,
    Phase,
    Progress,
    Refused,
    Welcome,
)

WAIT = b'{"rid": "a", "text": "wait"}'
WELCOME = Welcome(protocol=PROTOCOL_VERSION, router="test", heartbeat_interval_s=0.05, dead_after_s=30.0)


class PlainEngine:
    """Echoes bodies; one with ``wait`` is answered once disconnected, with ``hold`` once released; ``crash`` raises."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.released = asyncio.Event()
        self.cancelled = 0
        self.stopping = False
        self.received_at: dict[str, float] = {}
        self.questions = 0
        self.hangs = False
        self.controlled = False

    async def request(self, dispatch, received_at, body, disconnected):
        self.received_at[dispatch.rid] = received_at
        if b"hold" in bytes(body):
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if b"wait" in bytes(body):
            await disconnected.wait()
            return 400, "application/json", b"aborted inside"
        if bytes(body) == b"crash":
            raise ValueError("the engine broke")
        return 200, "text/plain", dispatch.path.encode() + b" " + bytes(body)

    def abort(self, rids):
        self.aborted += rids

    def is_stopping(self):
        return self.stopping

    async def sign_of_life(self):
        self.questions += 1
        if self.hangs:
            await asyncio.Event().wait()

    def is_under_control(self):
        return self.controlled

    async def hello(self, config):
        limits = Limits(max_context_tokens=1, max_kv_tokens=1, page_tokens=1, max_running_requests=1)
        return Hello(
            protocol=PROTOCOL_VERSION,
            name=config.name,
            incarnation="i",
            version="1",
            model="m",
            http_url="http://h:1",
            bootstrap_host="h",
            bootstrap_port=2,
            transfer_backend="zmq",
            limits=limits,
        )


class Router:
    """The router's end of the wire, driven by the test."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = b""

    async def receive(self, kind: type, also: Callable = lambda message: True):
        """The next message of ``kind``; others (heartbeats, progress) are passed over."""
        async with asyncio.timeout(10):
            while True:
                self.peer, *frames = await self.socket.recv_multipart()
                message, payload = decode_from_worker(frames)
                if isinstance(message, kind) and also(message):
                    return message, payload

    async def until_gone(self, peer: bytes) -> None:
        """Wait until the connection of a former greeting is closed."""
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        async with asyncio.timeout(10):
            while await self._reaches(peer):  # noqa: ASYNC110 - a closed connection raises no event here
                await asyncio.sleep(0.01)

    async def _reaches(self, peer: bytes) -> bool:
        try:
            await self.socket.send_multipart([peer, *encode(Drain())])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    async def send(self, message, *payload) -> None:
        await self.socket.send_multipart([self.peer, *encode(message, *payload)])


@asynccontextmanager
async def linked(
    *, join: bool = True, feed: EventFeed | None = None, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[Router, PlainEngine, asyncio.Task]]:
    context = zmq.asyncio.Context()
    router, engine = Router(context), PlainEngine()
    config = WorkerConfig(router=f"tcp://127.0.0.1:{router.port}", name="w0", hello_retry_s=0.05, refused_retry_s=0.05)
    task = asyncio.create_task(Link(config, engine, feed, clock).run())
    try:
        hello, _ = await router.receive(Hello)
        assert hello.name == "w0"
        if join:
            await router.send(WELCOME)
            await router.receive(Heartbeat)
        yield router, engine, task
    finally:
        task.cancel()
        await asyncio.wait([task])
        context.destroy(linger=0)


def test_dispatch_is_answered_with_what_the_engine_said() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            answer, (body,) = await router.receive(Answer)
            assert (answer.rid, answer.status, answer.content_type) == ("a", 200, "text/plain")
            assert body == b"/generate hi"

    asyncio.run(scenario())


def test_a_requests_age_is_counted_back_from_its_receipt() -> None:
    async def scenario() -> None:
        async with linked(clock=lambda: 1000.0) as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate", age_s=0.25), b"hi")
            await router.receive(Answer)
            await router.send(Dispatch(rid="b", path="/generate", age_s=-5.0), b"hi")
            await router.receive(Answer)
            assert engine.received_at == {"a": 999.75, "b": 1000.0}, "nobody can have received it in the future"

    asyncio.run(scenario())


class FastClock:
    """Seconds that pass a hundred times as fast."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()

    def __call__(self) -> float:
        return self._began_at + 100.0 * (time.monotonic() - self._began_at)


def test_a_scheduler_that_hangs_ends_the_worker_and_the_router_is_told() -> None:
    async def scenario() -> None:
        async with linked(clock=FastClock()) as (router, engine, task):
            engine.hangs = True
            await router.send(Dispatch(rid="a", path="/generate"), b"hold")
            await router.receive(Heartbeat, lambda beat: beat.load.silent_s > 3.0)
            goodbye, _ = await router.receive(Goodbye)
            assert "its scheduler process has not answered for 6" in goodbye.reason
            with pytest.raises(SchedulerHangs, match="--unresponsive-secs"):
                await task
            assert engine.questions == 1

    asyncio.run(scenario())


def test_a_scheduler_that_answers_or_has_a_control_request_is_no_hang() -> None:
    async def scenario() -> None:
        clock = FastClock()
        async with linked(clock=clock) as (router, engine, task):
            await router.send(Dispatch(rid="a", path="/generate"), b"hold")
            while engine.questions < 3:
                await router.receive(Heartbeat)
            engine.hangs = engine.controlled = True
            until = clock() + 150.0
            while clock() < until:
                beat, _ = await router.receive(Heartbeat)
                assert beat.load.silent_s == 0.0
            assert not task.done()

    asyncio.run(scenario())


def started(*rids: str) -> Event:
    return TaskStarted(
        at=1, task=1, rids=list(rids), new_tokens=1, cached_tokens=0, predicted_s=0.1, deadline_at=math.inf
    )


def preempted(*rids: str) -> Event:
    return TaskPreempted(at=2, task=1, rids=list(rids), victim_class="a", by_class="b", blocking_s=0.001)


def resumed(*rids: str) -> Event:
    return TaskResumed(at=3, task=1, rids=list(rids), suspended_s=1)


def test_what_the_scheduler_does_is_told_to_the_router(tmp_path: Path) -> None:
    async def scenario() -> None:
        endpoint = f"ipc://{tmp_path}/events"
        feed, reporter = EventFeed(endpoint), SchedulerReporter(endpoint)
        feed.open()
        try:
            async with linked(feed=feed) as (router, _, _):
                await router.send(Dispatch(rid="a", path="/generate"), WAIT)
                await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
                for event in (started("a", "stranger"), preempted("a", "stranger"), resumed("a", "stranger")):
                    reporter.record(event)
                reporter.flush()
                for phase in (Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED):
                    progress, _ = await router.receive(Progress, lambda told: told.phase != Phase.QUEUED)
                    assert progress == Progress(rid="a", phase=phase)
        finally:
            reporter.close()
            feed.close()

    asyncio.run(scenario())


def test_prompts_of_a_batch_speak_for_their_dispatch_until_they_end(tmp_path: Path) -> None:
    def arrived(rid: str) -> Event:
        return RequestArrived(at=1, rid=rid, tokens=1, slo_class="", received_at=1, deadline_at=2, dispatch_rid="batch")

    def ended(rid: str) -> Event:
        return RequestEnded(at=1, rid=rid, outcome=Outcome.PREFILLED, slo_class="", first_token_s=1, is_in_time=True)

    async def scenario() -> None:
        endpoint = f"ipc://{tmp_path}/events"
        feed, reporter = EventFeed(endpoint), SchedulerReporter(endpoint)
        feed.open()
        try:
            async with linked(feed=feed) as (router, _, _):
                await router.send(Dispatch(rid="batch", path="/generate"), b'{"rid": ["b0", "b1"], "text": "wait"}')
                await router.send(Dispatch(rid="last", path="/generate"), WAIT)
                await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
                for event in (
                    *(arrived("b0"), arrived("b1"), started("b0"), preempted("b0"), started("b1")),
                    *(ended("b0"), ended("b1"), preempted("b1"), started("last")),
                ):
                    reporter.record(event)
                reporter.flush()
                told = []
                while not told or told[-1].rid != "last":
                    told.append((await router.receive(Progress, lambda told: told.phase != Phase.QUEUED))[0])
                phases = [message.phase for message in told[:-1]]
                assert {message.rid for message in told[:-1]} == {"batch"}
                assert phases == [Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED], "one that has ended is forgotten"
        finally:
            reporter.close()
            feed.close()

    asyncio.run(scenario())


def test_many_requests_at_once_are_each_answered_once() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            for number in range(200):
                await router.send(Dispatch(rid=str(number), path="/generate"), str(number).encode())
            answers = dict([await _rid_and_body(router) for _ in range(200)])
            assert answers == {str(n): f"/generate {n}".encode() for n in range(200)}

    async def _rid_and_body(router: Router) -> tuple[str, bytes]:
        answer, (body,) = await router.receive(Answer)
        return answer.rid, body

    asyncio.run(scenario())


def test_a_path_outside_the_list_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/update_weights_from_disk"), b"{}")
            answer, _ = await router.receive(Answer)
            assert answer.status == 404

    asyncio.run(scenario())


def test_an_engine_that_raises_fails_only_that_request() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"crash")
            answer, (body,) = await router.receive(Answer)
            assert answer.status == 500
            assert b"the engine broke" in bytes(body)
            await router.send(Dispatch(rid="b", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200

    asyncio.run(scenario())


def test_abort_reaches_the_engine_and_is_answered_499() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Abort(rid="a"))
            answer, _ = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 499)
            assert engine.aborted[0] == "a"

    asyncio.run(scenario())


def test_nonsense_from_the_router_is_dropped() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, task):
            for frames in ([b"\xff\xff"], [b""], [b"x" * 100_000], [*encode(Abort(rid="a")), b"extra"]):
                await router.socket.send_multipart([router.peer, *frames])
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200
            assert not task.done()

    asyncio.run(scenario())


def test_a_router_that_forgot_us_is_greeted_on_a_new_connection() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            former = router.peer
            await router.send(HelloAgain())
            await router.receive(Hello)
            assert router.peer != former
            await router.until_gone(former)
            assert engine.aborted[0] == "a"
            await router.send(WELCOME)
            beat, _ = await router.receive(Heartbeat)
            assert beat.load.in_flight == 0

    asyncio.run(scenario())


def test_greetings_do_not_pile_up_while_there_is_no_router() -> None:
    class Counting(PlainEngine):
        turns = 0

        def is_stopping(self):
            self.turns += 1
            return False

    async def scenario() -> None:
        with zmq.asyncio.Context() as context:
            probe = Router(context)
            probe.socket.unbind(f"tcp://127.0.0.1:{probe.port}")
            engine = Counting()
            config = WorkerConfig(router=f"tcp://127.0.0.1:{probe.port}", name="w0", hello_retry_s=0.02)
            task = asyncio.create_task(Link(config, engine).run())
            async with asyncio.timeout(10):
                while engine.turns < 60:  # noqa: ASYNC110 - turns raise no event
                    await asyncio.sleep(0.01)
            probe.socket.bind(config.router)
            await probe.receive(Hello)
            await probe.send(WELCOME)
            greetings = 1
            async with asyncio.timeout(10):
                while True:
                    _, *frames = await probe.socket.recv_multipart()
                    if isinstance(decode_from_worker(frames)[0], Heartbeat):
                        break
                    greetings += 1
            assert greetings < 50, "only those since the connection was made"
            task.cancel()
            await asyncio.wait([task])
            probe.socket.close(linger=0)

    asyncio.run(scenario())


def test_drained_worker_says_goodbye_and_stops() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, task):
            await router.send(Drain())
            await router.receive(Goodbye)
            await asyncio.wait_for(task, 10)

    asyncio.run(scenario())


def test_a_worker_told_to_stop_drains_by_itself() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            engine.stopping = True
            goodbye, _ = await router.receive(Goodbye)
            assert goodbye.reason == "drained"

    asyncio.run(scenario())


def test_a_refused_worker_says_why_once_and_joins_a_router_that_was_upgraded(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with linked(join=False) as (router, _, task):
            for _ in range(3):
                await router.send(Refused(reason="upgrade router", protocol=0))
                await router.receive(Hello)
            assert not task.done()
            await router.send(WELCOME)
            await router.receive(Heartbeat)
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200

    asyncio.run(scenario())
    assert [record.levelname for record in caplog.records if "upgrade router" in record.message] == ["ERROR"]


def test_cancelled_worker_says_goodbye() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, task):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Dispatch(rid="b", path="/generate"), b'{"rid": "b", "text": "hold"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
            task.cancel()
            await router.receive(Goodbye)
            await asyncio.wait([task])
            assert engine.aborted == ["a", "b"]
            await asyncio.sleep(0)  # the turn in which the cancellation arrives
            assert engine.cancelled == 1, "what the engine does not let go of is cancelled with the link"

    asyncio.run(scenario())


def test_a_batch_of_a_clients_own_names_is_aborted_by_these_names_only() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            body = b'{"rid": ["mine", "yours"], "text": ["wait", "wait"]}'
            await router.send(Dispatch(rid="a", path="/generate"), body)
            await router.send(Dispatch(rid="ab", path="/generate"), b'{"rid": "ab", "text": "wait"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
            await router.send(Abort(rid="a"))
            answer, _ = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 499)
            assert set(engine.aborted) == {"mine", "yours"}

    asyncio.run(scenario())


def test_an_abort_is_said_again_until_the_engine_has_let_go() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Abort(rid="a"))
            await router.receive(Heartbeat, lambda beat: len(engine.aborted) > 1)
            engine.released.set()
            assert (await router.receive(Answer))[0].status == 499

    asyncio.run(scenario())


def test_a_dropped_request_does_not_answer_for_a_new_one_of_its_name() -> None:
    """The router restarted while the engine still held the first ``a``, and a client asks for another one."""

    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold, the former"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(HelloAgain())
            await router.receive(Hello)
            await router.send(WELCOME)
            await router.receive(Heartbeat)
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold, the latter"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            engine.released.set()
            answer, (body,) = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 200)
            assert b"the latter" in bytes(body)
            beat, _ = await router.receive(Heartbeat)
            assert beat.load.in_flight == 0

    asyncio.run(scenario())


def test_an_engine_that_cannot_say_what_it_is_ends_the_link() -> None:
    class Mute(PlainEngine):
        async def hello(self, config):
            raise PeerFault("SGLang answered 500 to GET /server_info")

    async def scenario() -> None:
        with pytest.raises(PeerFault, match="server_info"):
            await Link(WorkerConfig(router="tcp://127.0.0.1:1", name="w"), Mute()).run()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"text": "x", "rid": "a"}', ["a"]),
        (b'{"rid": ["a", "b"]}', ["a", "b"]),
        (b'{"text": "x"}', []),
        (b'{"rid": null}', []),
        (b"[1]", []),
        (b"\xff", []),
        (b"", []),
    ],
)
def test_names_of_a_body(body: bytes, expected: list[str]) -> None:
    assert names(body) == expected
