"""What the link asks of SGLang's scheduler process, through SGLang's own communicators."""

from __future__ import annotations

from typing import Any

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

SCRIPT = """
    import asyncio
    import tempfile
    from types import ModuleType, SimpleNamespace

    import zmq.asyncio
    from sglang.srt.managers.communicator import FanOutCommunicator
    from sglang.srt.managers.io_struct import HealthCheckOutput
    from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS, TokenizerControlMixin

    from sglang.utils import TypeBasedDispatcher

    from flowprefill_sglang.integration import detokenizer
    from flowprefill_sglang.integration.engine import SGLangEngine
    from flowprefill_sglang.prefill_worker.signs_of_life import Part

    class Manager:
        get_internal_state = TokenizerControlMixin.get_internal_state
        model_update_result = None

        def __init__(self):
            self.auto_create_handle_loop = lambda: None
            self.sent = asyncio.Event()
            self.recv_from_detokenizer = zmq.asyncio.Context().socket(zmq.PULL)
            self._result_dispatcher = TypeBasedDispatcher([])
            address = SimpleNamespace(detokenizer_ipc_name=f"ipc://{tempfile.mkdtemp(dir='/tmp')}/detokenizer")
            detokenizer.keep_address(None, self, address)
            for name, *_ in _COMMUNICATOR_SPECS:
                communicator = FanOutCommunicator(lambda request: self.sent.set(), 1)
                setattr(self, f"{name}_communicator", communicator)

    async def scenario():
        manager = Manager()
        server = ModuleType("http_server")  # SGLang's own takes seconds to import
        server.get_global_state = lambda: SimpleNamespace(tokenizer_manager=manager)
        sys.modules["sglang.srt.entrypoints.http_server"] = server
        engine = SGLangEngine(None)
        facts["at_rest"] = engine.is_under_control()

        asking = asyncio.create_task(engine.sign_of_life(Part.SCHEDULER))
        await manager.sent.wait()
        facts["asked"] = [engine.is_under_control(), asking.done()]
        manager.get_internal_state_communicator.handle_recv(SimpleNamespace(internal_state={}))
        await asking
        facts["answered"] = asking.done()
        asking = asyncio.create_task(engine.sign_of_life(Part.DETOKENIZER))
        await asyncio.wait([asking], timeout=0.1)
        facts["asked_the_other"] = asking.done()
        manager._result_dispatcher(HealthCheckOutput())
        await asking

        manager.sent.clear()
        flushing = asyncio.create_task(manager.flush_cache_communicator("flush"))
        await manager.sent.wait()
        facts["flushing"] = engine.is_under_control()
        manager.flush_cache_communicator.handle_recv("flushed")
        await flushing
        facts["flushed"] = engine.is_under_control()

        manager.model_update_result = asyncio.get_running_loop().create_future()
        facts["updating"] = engine.is_under_control()
        manager.model_update_result.set_result(None)
        facts["updated"] = engine.is_under_control()
        manager.recv_from_detokenizer.context.destroy(0)

    asyncio.run(scenario())
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return facts_of(SCRIPT)


def test_a_question_is_answered_by_the_scheduler_and_is_no_control_request(facts: dict[str, Any]) -> None:
    assert not facts["at_rest"]
    assert facts["asked"] == [False, False]
    assert facts["answered"]


def test_a_question_to_the_detokenizer_is_answered_by_it(facts: dict[str, Any]) -> None:
    assert not facts["asked_the_other"]


def test_a_control_request_is_known_until_it_is_done(facts: dict[str, Any]) -> None:
    assert (facts["flushing"], facts["flushed"]) == (True, False)
    assert (facts["updating"], facts["updated"]) == (True, False), "new weights from disk go another way"
