"""The chosen requests, and only they, get into SGLang's batch; what SGLang keeps for one request at a time is left as
it was found. With a stand-in that keeps SGLang's book of chunks."""

from __future__ import annotations

from typing import Any

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

SCRIPT = """
    from types import SimpleNamespace

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from flowprefill_sglang.integration.prefill import batches
    from flowprefill_sglang.integration.prefill.batches import PrefillBatches

    batches.set_schedule_time_batch = lambda batch: None

    class Req:
        def __init__(self, name, tokens):
            self.name, self.left, self.finished_reason, self.to_finish = name, tokens, None, None
            self.return_logprob = False
            self.time_stats = SimpleNamespace(set_completion_time=lambda: None)

        def __repr__(self):
            return self.name

    class Scheduler:
        # SGLang's rules on waiting_queue and chunked_req; it admits at most 100 tokens a batch.
        def __init__(self, *waiting):
            self.waiting_queue, self.chunked_req = list(waiting), None
            self.running_batch = SimpleNamespace(batch_is_full=True)
            self.ngram_embedding_manager = SimpleNamespace(prepare_for_forward=lambda batch, chunked_req: batch)
            self.happened, self.is_full, self.enable_lora = [], False, False
            self.output_streamer = SimpleNamespace(stream_output=lambda reqs, logprob: self.note("answered", reqs))

        def note(self, *what):
            self.happened.append(seen(what))

        def get_new_batch_prefill(self, running_batch):
            assert not running_batch.batch_is_full, "or SGLang admits nothing"
            room, reqs, chunked = 0 if self.is_full else 100, [], None
            for req in [*([self.chunked_req] if self.chunked_req else []), *self.waiting_queue]:
                if room > 0:
                    reqs.append(req)
                    chunked = req if req.left > room else chunked
                    room -= req.left
            self.chunked_req = chunked if reqs else self.chunked_req
            self.waiting_queue = [req for req in self.waiting_queue if req not in reqs]
            batch = SimpleNamespace(reqs=reqs) if reqs else None
            return SimpleNamespace(running_batch=running_batch, batch_to_run=batch)

        def process_batch_result(self, batch, result):
            self.note("result", self.chunked_req)
            if result == "fails":
                raise RuntimeError

        def process_prefill_chunk(self, last_batch, running_batch):
            self.note("checkpoint", self.chunked_req)
            last_batch.reqs.remove(self.chunked_req)  # as filter_batch does

        def _retire_aborted_prefill_result(self, req):
            self.note("retired", req)
            return req.name != "gone"

        def books(self):
            return {"waiting": seen(self.waiting_queue), "chunked": seen(self.chunked_req)}

    def seen(value):
        return [seen(v) for v in value] if isinstance(value, (list, tuple)) else str(value)

    def small_and_large(waiting=""):
        reqs = {name: Req(name, 250 if name == "l" else 30) for name in "abcl"}
        return reqs, Scheduler(*(reqs[name] for name in waiting))

    # ---- the chosen only
    reqs, scheduler = small_and_large("ablc")
    batch = PrefillBatches(scheduler).begin([reqs["c"], reqs["a"]])
    facts["chosen"] = {"batch": seen(batch.reqs), "of a chunk": seen(batch.chunked), **scheduler.books()}

    # ---- more than fits
    reqs, scheduler = small_and_large("abl")
    batch = PrefillBatches(scheduler).begin([reqs["a"], reqs["l"], reqs["b"]])
    facts["cut"] = {"batch": seen(batch.reqs), "of a chunk": seen(batch.chunked), **scheduler.books()}

    # ---- nothing fits
    reqs, scheduler = small_and_large("ab")
    scheduler.is_full = True
    batches = PrefillBatches(scheduler)
    facts["full"] = {"batch": seen(batches.begin([reqs["b"]])), "next": seen(batches.next_chunk(reqs["l"]))}
    facts["full"] |= scheduler.books()

    # ---- one chunk after the other
    reqs, scheduler = small_and_large("alb")
    batches, large = PrefillBatches(scheduler), reqs["l"]
    rounds = []
    batch = batches.begin([large])
    while True:
        half = batches.finish(batch, "result")
        rounds.append({"batch": seen(batch.reqs), "half": seen(half), **scheduler.books()})
        if half is None:
            break
        large.left -= 100
        batch = batches.next_chunk(half)
    facts["chunks"] = {"rounds": rounds, "happened": scheduler.happened}

    # ---- the next chunk of a prompt with an adapter, of which none or one finds a slot
    for slots in (0, 1):
        reqs, scheduler = small_and_large("a")
        reqs["l"].lora_id, scheduler.enable_lora = "adapter", True
        lora_manager = SimpleNamespace(validate_lora_batch=lambda lora_ids: len(lora_ids) <= slots)
        scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=lora_manager))
        batch = PrefillBatches(scheduler).next_chunk(reqs["l"])
        facts[f"{slots} slots"] = {"batch": seen(batch and batch.reqs), **scheduler.books()}

    # ---- aborted while its chunk ran
    reqs, scheduler = small_and_large("l")
    batches, large = PrefillBatches(scheduler), reqs["l"]
    batch = batches.begin([large])
    large.to_finish = large.finished_reason = FINISH_ABORT()
    facts["aborted"] = {"half": seen(batches.finish(batch, "result")), "happened": scheduler.happened}

    # ---- a result that SGLang cannot take
    reqs, scheduler = small_and_large("l")
    batches = PrefillBatches(scheduler)
    batch = batches.begin([reqs["l"]])
    try:
        batches.finish(batch, "fails")
    except RuntimeError:
        facts["failed"] = scheduler.books()

    # ---- given back
    reqs, scheduler = small_and_large()
    gone = Req("gone", 1)
    PrefillBatches(scheduler).retire([reqs["a"], gone, reqs["b"]])
    PrefillBatches(scheduler).retire([gone])
    facts["retired"] = scheduler.happened
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return facts_of(SCRIPT)


def test_only_the_chosen_get_in(facts: dict[str, Any]) -> None:
    assert facts["chosen"] == {"batch": ["c", "a"], "of a chunk": "None", "waiting": ["b", "l"], "chunked": "None"}


def test_what_does_not_fit_goes_on_waiting(facts: dict[str, Any]) -> None:
    assert facts["cut"] == {"batch": ["a", "l"], "of a chunk": "l", "waiting": ["b"], "chunked": "None"}


def test_none_admitted_changes_nothing(facts: dict[str, Any]) -> None:
    assert facts["full"]["batch"] == facts["full"]["next"] == "None"
    assert sorted(facts["full"]["waiting"]) == ["a", "b"]
    assert facts["full"]["chunked"] == "None"


def test_a_prompt_chunk_by_chunk(facts: dict[str, Any]) -> None:
    rounds = facts["chunks"]["rounds"]
    assert [r["half"] for r in rounds] == ["l", "l", "None"]
    for r in rounds:
        assert r["batch"] == ["l"], "a batch knows its requests after SGLang has taken the half-done one out"
        assert r["waiting"] == ["a", "b"]
        assert r["chunked"] == "None", "others may be half done at the same time"
    chunk, last = [["result", "l"], ["checkpoint", "l"]], [["result", "None"]]
    assert facts["chunks"]["happened"] == chunk + chunk + last


def test_a_chunk_waits_for_a_slot_of_its_adapter(facts: dict[str, Any]) -> None:
    books = {"waiting": ["a"], "chunked": "None"}
    assert facts["0 slots"] == {"batch": "None", **books}
    assert facts["1 slots"] == {"batch": ["l"], **books}


def test_an_aborted_chunk_gets_no_checkpoint(facts: dict[str, Any]) -> None:
    assert facts["aborted"] == {"half": "l", "happened": [["result", "l"]]}


def test_a_failure_leaves_no_chunk_behind(facts: dict[str, Any]) -> None:
    assert facts["failed"]["chunked"] == "None"


def test_the_aborted_are_answered_once(facts: dict[str, Any]) -> None:
    """One that SGLang has let go already was answered by it."""
    first = [["retired", "a"], ["retired", "gone"], ["retired", "b"], ["answered", ["a", "b"]]]
    assert facts["retired"] == [*first, ["retired", "gone"]]
