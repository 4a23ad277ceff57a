"""Questions and health answers that pass SGLang's own detokenizer loop, over its own sockets and messages."""

from __future__ import annotations

from typing import Any

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

SCRIPT = """
    import asyncio, collections, contextlib, tempfile, threading
    from types import SimpleNamespace

    import zmq, zmq.asyncio
    from sglang.srt import runtime_context
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.io_struct import HealthCheckOutput, async_sock_recv
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
    from sglang.utils import TypeBasedDispatcher

    from flowprefill_sglang.integration import detokenizer

    folder = tempfile.mkdtemp(dir="/tmp")
    to_detokenizer, to_tokenizer = f"ipc://{folder}/detokenizer", f"ipc://{folder}/tokenizer"
    context = zmq.Context()

    def connected(address):
        socket = context.socket(zmq.PUSH)
        socket.connect(address)
        return socket

    def run_detokenizer():
        manager = DetokenizerManager.__new__(DetokenizerManager)
        manager.recv_from_scheduler = context.socket(zmq.PULL)
        manager.recv_from_scheduler.bind(to_detokenizer)
        manager.send_to_tokenizer = connected(to_tokenizer)
        manager.soft_watchdog = SimpleNamespace(disable=contextlib.nullcontext, feed=lambda: None)
        manager.init_request_dispatcher()
        detokenizer.pass_health_answers_on(None, manager)
        with contextlib.suppress(zmq.ContextTerminated):
            manager.event_loop()
        manager.recv_from_scheduler.close(0)
        manager.send_to_tokenizer.close(0)

    def scheduler():
        return SimpleNamespace(
            return_health_check_ipcs=collections.deque([None, None]),
            rust_server=None,
            ipc_channels=SimpleNamespace(send_to_detokenizer=SenderWrapper(connected(to_detokenizer))),
        )

    async def scenario():
        manager = SimpleNamespace(_result_dispatcher=TypeBasedDispatcher([(HealthCheckOutput, lambda answer: None)]))
        manager.recv_from_detokenizer = zmq.asyncio.Context().socket(zmq.PULL)
        manager.recv_from_detokenizer.bind(to_tokenizer)
        detokenizer.keep_address(None, manager, SimpleNamespace(detokenizer_ipc_name=to_detokenizer))

        async def receive():
            manager._result_dispatcher(await async_sock_recv(manager.recv_from_detokenizer))

        questions = detokenizer.Questions(manager)
        asking, receiving = asyncio.create_task(questions.ask()), asyncio.create_task(receive())
        await asyncio.wait([asking, receiving], timeout=0.5)
        facts["before"] = [asking.done(), receiving.done()]
        thread = threading.Thread(target=run_detokenizer)
        thread.start()
        await asyncio.wait_for(asyncio.gather(asking, receiving), 20)
        facts["after"] = [asking.done(), receiving.done()]

        busy, past_it = scheduler(), []
        runtime_context.get_serving = lambda: SimpleNamespace(detokenizer_worker_num=1)
        detokenizer.answer_through_detokenizer(past_it.append, busy)
        await asyncio.wait_for(receive(), 20)
        facts["health"] = [len(busy.return_health_check_ipcs), len(past_it)]
        runtime_context.get_serving = lambda: SimpleNamespace(detokenizer_worker_num=2)
        detokenizer.answer_through_detokenizer(past_it.append, busy)
        busy.return_health_check_ipcs.clear()
        detokenizer.answer_through_detokenizer(past_it.append, busy)
        facts["with_several"] = past_it == [busy]
        manager.recv_from_detokenizer.context.destroy(0)
        busy.ipc_channels.send_to_detokenizer.socket.close(0)
        await asyncio.to_thread(context.term)
        thread.join()

    asyncio.run(scenario())
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return facts_of(SCRIPT)


def test_a_question_is_answered_by_the_detokenizer_alone(facts: dict[str, Any]) -> None:
    assert facts["before"] == [False, False]
    assert facts["after"] == [True, True]


def test_a_busy_schedulers_health_answer_passes_the_detokenizer(facts: dict[str, Any]) -> None:
    assert facts["health"] == [1, 0], "one answer a call, and SGLang's own way is not taken"
    assert facts["with_several"]
