from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.prefill_worker.admission import Refusal, Room

EMPTY = Room(
    free_kv_tokens=1000, claimed_kv_tokens=0, tasks=0, max_tasks=4, activation_bytes=0, max_activation_bytes=100
)


def test_an_empty_worker_leaves_the_decision_to_sglang() -> None:
    assert EMPTY.refusal(5000, 10_000, is_begun=False) is None


def test_a_prompt_must_fit_beside_what_the_half_prefilled_still_need() -> None:
    room = replace(EMPTY, tasks=1, claimed_kv_tokens=400)
    assert room.refusal(600, 1, is_begun=False) is None
    assert room.refusal(601, 1, is_begun=False) is Refusal.KV


def test_the_next_chunk_of_a_begun_prompt_has_its_kv_claimed_already() -> None:
    room = replace(EMPTY, tasks=1, claimed_kv_tokens=1000)
    assert room.refusal(900, 1, is_begun=True) is None


def test_a_half_prefilled_prompt_alone_keeps_others_out() -> None:
    room = replace(EMPTY, claimed_kv_tokens=900)
    assert room.refusal(200, 1, is_begun=False) is Refusal.KV


def test_activations_have_a_budget_once_something_is_under_way() -> None:
    room = replace(EMPTY, tasks=1, activation_bytes=60)
    assert room.refusal(1, 40, is_begun=False) is None
    assert room.refusal(1, 41, is_begun=False) is Refusal.ACTIVATIONS
    assert room.refusal(1, 41, is_begun=True) is Refusal.ACTIVATIONS


def test_slots_for_tasks_are_counted_first() -> None:
    assert replace(EMPTY, tasks=4).refusal(1, 1, is_begun=True) is Refusal.TASKS


@given(
    pool=st.integers(50, 400),
    chunk=st.integers(1, 60),
    prompts=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_whatever_the_order_of_chunks_every_prompt_that_fits_the_pool_ends(
    pool: int, chunk: int, prompts: list[int], order
) -> None:
    """The banker's rule: begun prompts take their KV chunk by chunk, ended ones give it back."""
    waiting = [tokens for tokens in prompts if tokens <= pool]
    begun: list[list[int]] = []  # of each: tokens taken, tokens in all
    ended = 0
    for _ in range(10_000):
        if not waiting and not begun:
            break
        free = pool - sum(taken for taken, _ in begun)
        room = Room(
            free_kv_tokens=free,
            claimed_kv_tokens=sum(total - taken for taken, total in begun),
            tasks=len(begun),
            max_tasks=99,
            activation_bytes=0,
            max_activation_bytes=1,
        )
        startable = [tokens for tokens in waiting if room.refusal(tokens, 0, is_begun=False) is None]
        startable = [tokens for tokens in startable if min(chunk, tokens) <= free]
        if startable and (not begun or order.random() < 0.7):
            tokens = order.choice(startable)
            waiting.remove(tokens)
            begun.append([min(chunk, tokens), tokens])
        else:
            assert begun, "nothing is under way and nothing may start"
            prompt = order.choice(begun)
            assert min(chunk, prompt[1] - prompt[0]) <= free, "a begun prompt cannot get its next chunk"
            prompt[0] += min(chunk, prompt[1] - prompt[0])
        done = [prompt for prompt in begun if prompt[0] == prompt[1]]
        for prompt in done:
            begun.remove(prompt)
            ended += 1
    assert not waiting
    assert not begun
    assert ended == sum(tokens <= pool for tokens in prompts)
