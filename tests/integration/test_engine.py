"""What the link asks of SGLang, against SGLang's own classes."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("sglang")
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS, TokenizerControlMixin

from flowprefill_sglang.integration.engine import SGLangEngine


class Manager:
    """As much of a tokenizer manager as takes control requests."""

    get_internal_state = TokenizerControlMixin.get_internal_state

    def __init__(self) -> None:
        self.sent = asyncio.Event()
        self.model_update_result: asyncio.Future[None] | None = None
        self.get_internal_state_communicator = FanOutCommunicator(lambda request: self.sent.set(), 1)
        self.flush_cache_communicator = FanOutCommunicator(lambda request: self.sent.set(), 1)

    def auto_create_handle_loop(self) -> None:
        """There is nothing to read from."""


def engine_of(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> SGLangEngine:
    server = ModuleType("http_server")  # SGLang's own takes seconds to import
    server.get_global_state = lambda: SimpleNamespace(tokenizer_manager=manager)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", server)
    return SGLangEngine(lambda scope, receive, send: None)


def test_sglang_names_them_so() -> None:
    names = [spec[0] for spec in _COMMUNICATOR_SPECS]
    assert {"get_internal_state", "flush_cache", "update_weights_from_tensor", "release_memory_occupation"} <= set(
        names
    )


def test_a_question_is_answered_by_the_scheduler_and_is_no_control_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        manager = Manager()
        engine = engine_of(manager, monkeypatch)
        asking = asyncio.create_task(engine.sign_of_life())
        await manager.sent.wait()
        assert not engine.is_under_control()
        assert not asking.done()
        manager.get_internal_state_communicator.handle_recv(SimpleNamespace(internal_state={}))
        await asking

    asyncio.run(scenario())


def test_a_control_request_is_known_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        manager = Manager()
        engine = engine_of(manager, monkeypatch)
        assert not engine.is_under_control()
        flushing = asyncio.create_task(manager.flush_cache_communicator("flush"))
        await manager.sent.wait()
        assert engine.is_under_control()
        manager.flush_cache_communicator.handle_recv("flushed")
        await flushing
        assert not engine.is_under_control()
        manager.model_update_result = asyncio.get_running_loop().create_future()
        assert engine.is_under_control(), "new weights from disk go another way"
        manager.model_update_result.set_result(None)
        assert not engine.is_under_control()

    asyncio.run(scenario())
