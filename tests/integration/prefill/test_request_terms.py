"""A request's terms on their way: dispatch, SGLang's own message, scheduler."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill_sglang.integration.prefill.request_terms import attach, dispatched, terms_of
from flowprefill_sglang.wire.messages import Dispatch
from flowprefill_testing.sglang_process import facts_of

DISPATCH = Dispatch(rid="d1", path="/generate", ttft_slo_s=0.25, slo_class="text", priority=7)


def tokenized(custom_params: Any = None) -> Any:
    """The part of SGLang's TokenizedGenerateReqInput that matters."""
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params))


def attached(custom_params: Any = None, dispatch: Dispatch | None = DISPATCH) -> Any:
    message = tokenized(custom_params)
    if dispatch is None:
        attach(message)
    else:
        with dispatched(dispatch, 100.0):
            attach(message)
    return message.sampling_params.custom_params


def req(custom_params: Any, *, rid: str = "r1", priority: int | None = None, seen_at: float = 200.0) -> Any:
    """The part of SGLang's Req that matters."""
    return SimpleNamespace(
        rid=rid,
        priority=priority,
        sampling_params=SimpleNamespace(custom_params=custom_params),
        time_stats=SimpleNamespace(scheduler_recv_time=seen_at),
    )


def test_a_dispatchs_terms_reach_the_scheduler() -> None:
    before = time.monotonic()
    terms = terms_of(req(attached(), rid="r1"), now=300.0, default_objective_s=60.0)
    assert (terms.rid, terms.dispatch_rid, terms.slo_class, terms.priority) == ("r1", "d1", "text", 7)
    assert (terms.received_at, terms.objective_s, terms.deadline_at) == (100.0, 0.25, 100.25)
    assert before <= terms.sent_at <= time.monotonic()


def test_an_old_routers_dispatch_has_the_default_objective() -> None:
    terms = terms_of(req(attached(dispatch=Dispatch(rid="d1", path="/generate")), priority=3), 300.0, 60.0)
    assert (terms.received_at, terms.deadline_at, terms.slo_class, terms.priority) == (100.0, 160.0, "", 3)


def test_an_objective_that_is_never_due() -> None:
    never = Dispatch(rid="d1", path="/generate", ttft_slo_s=math.inf)
    assert terms_of(req(attached(dispatch=never)), 300.0, 60.0).deadline_at == math.inf


def test_a_client_without_a_router_says_its_objective_itself() -> None:
    params = attached({"ttft_slo_ms": 250}, dispatch=None)
    terms = terms_of(req(params, priority=2), 300.0, 60.0)
    assert (terms.rid, terms.dispatch_rid, terms.slo_class, terms.priority) == ("r1", "", "", 2)
    assert (terms.received_at, terms.sent_at, terms.deadline_at) == (200.0, 200.0, 200.25)


def test_a_request_that_says_nothing_is_left_as_it_is() -> None:
    assert attached(None, dispatch=None) is None
    terms = terms_of(req(None, seen_at=0.0), 300.0, 60.0)
    assert (terms.received_at, terms.deadline_at, terms.priority) == (300.0, 360.0, 0)


def test_terms_stay_the_same_at_every_call() -> None:
    request = req(attached(), seen_at=0.0)
    assert terms_of(request, 300.0, 60.0) is terms_of(request, 999.0, 1.0)


@pytest.mark.parametrize("own", [None, {}, {"thinking_budget": 5}, {"a": [1, 2], "b": {"c": "d"}}])
def test_what_a_user_wrote_comes_back_as_it_was(own: dict[str, Any] | None) -> None:
    request = req(attached(own))
    terms_of(request, 300.0, 60.0)
    assert request.sampling_params.custom_params == (own or None)


def test_the_users_own_dictionary_is_not_written_to() -> None:
    own = {"thinking_budget": 5}  # shared by the prompts of a batch
    attached(own)
    assert own == {"thinking_budget": 5}


def test_the_routers_word_wins_over_the_clients() -> None:
    forged = {"ttft_slo_ms": 1, "received_at_s": 0.0, "slo_class": "vip", "dispatch_rid": "x", "dispatch_priority": 99}
    terms = terms_of(req(attached(forged)), 300.0, 60.0)
    assert (terms.objective_s, terms.received_at, terms.slo_class, terms.dispatch_rid) == (0.25, 100.0, "text", "d1")
    assert terms.priority == 7


def test_a_client_cannot_put_its_request_in_the_past() -> None:
    forged = {"received_at_s": 0.0, "sent_at_s": 0.0, "slo_class": "vip", "dispatch_rid": "x", "dispatch_priority": 99}
    terms = terms_of(req(attached(forged, dispatch=None)), 300.0, 60.0)
    assert (terms.received_at, terms.sent_at, terms.slo_class, terms.dispatch_rid) == (200.0, 200.0, "", "")
    assert terms.priority == 0


@pytest.mark.parametrize("value", ["250", -1, 0, math.nan, math.inf, True, [250], {"ms": 250}])
def test_an_objective_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"custom_params\.ttft_slo_ms must be a number of milliseconds above 0"):
        attached({"ttft_slo_ms": value}, dispatch=None)


@pytest.mark.parametrize("value", ["text", 3, [1]])
def test_custom_params_that_are_no_object_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="custom_params must be an object"):
        attached(value)


def test_tasks_started_within_a_dispatch_belong_to_it_and_others_do_not() -> None:
    """As SGLang's handlers do it: sub-tasks for batches, a task of the server's for a streamed answer."""

    async def prompt() -> Any:
        await asyncio.sleep(0)
        message = tokenized()
        attach(message)
        return message.sampling_params.custom_params

    async def request(rid: str | None) -> list[Any]:
        if rid is None:
            return await asyncio.gather(prompt(), prompt())
        with dispatched(Dispatch(rid=rid, path="/generate"), 1.0):
            return await asyncio.gather(prompt(), asyncio.ensure_future(asyncio.create_task(prompt())))

    async def scenario() -> None:
        a, none, b = await asyncio.gather(request("a"), request(None), request("b"))
        assert [params["dispatch_rid"] for params in (*a, *b)] == ["a", "a", "b", "b"]
        assert none == [None, None]

    asyncio.run(scenario())


def test_the_real_tokenizer_managers_message_carries_the_terms_and_sglang_survives_them() -> None:
    """SGLang's own function makes the message, its own codec carries it, and its own checks find nothing in it."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of("""
        from types import SimpleNamespace as Any
        from unittest.mock import MagicMock
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.managers import io_struct, tokenizer_manager
        from sglang.srt.sampling.sampling_params import SamplingParams
        from flowprefill_sglang.integration.prefill.request_terms import dispatched, terms_of
        from flowprefill_sglang.wire.messages import Dispatch

        tokenizer_manager._validate_watermark_request = lambda params: None  # asks for the server's arguments
        tokenizer_manager.get_disagg = lambda: Any(disaggregation_transfer_backend="zmq")
        manager = object.__new__(tokenizer_manager.TokenizerManager)
        manager.__dict__.update(
            preferred_sampling_params=None, sampling_params_class=SamplingParams, tokenizer=None,
            model_config=Any(vocab_size=100), tokenized_generate_req_type=io_struct.TokenizedGenerateReqInput,
            rid_to_state={"r1": MagicMock()},
        )

        def sent(own):
            obj = io_struct.GenerateReqInput(
                input_ids=[1, 2], rid="r1", sampling_params={"max_new_tokens": 1, "custom_params": own})
            obj.normalize_batch_and_arguments()
            with dispatched(Dispatch(rid="d1", path="/generate", ttft_slo_s=0.25, slo_class="text", priority=7), 100.0):
                message = manager._create_tokenized_object(obj, None, [1, 2])
            message.time_stats = None
            message.wrap_pickle_fields()
            arrived = io_struct.msgpack_decode(io_struct.msgpack_encode(message))
            arrived.sampling_params.verify(100)
            return arrived

        def read(message):
            req = Any(rid="r1", priority=None, sampling_params=message.sampling_params,
                      time_stats=Any(scheduler_recv_time=0.0))
            terms = terms_of(req, 300.0, 60.0)
            return [terms.rid, terms.dispatch_rid, terms.deadline_at, terms.slo_class, terms.priority]

        plain, with_own = sent(None), sent({"thinking_budget": 5})
        facts["plain"] = read(plain)
        facts["with_own"] = read(with_own)
        facts["left"] = [plain.sampling_params.custom_params, with_own.sampling_params.custom_params]
        try:
            sent({"ttft_slo_ms": "soon"})
        except ValueError as error:
            facts["refused"] = str(error)
    """)
    assert facts["plain"] == facts["with_own"] == ["r1", "d1", 100.25, "text", 7]
    assert facts["left"] == [None, {"thinking_budget": 5}]
    assert "ttft_slo_ms must be a number" in facts["refused"]
