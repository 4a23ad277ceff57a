"""A pool that is too small for what is asked: everybody is served, in bounded time, in whichever order they come.

The worker ``tight`` has 6,600 slots, in pages of 16, and chunks of 1,024 tokens."""

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.direct import Answer, Pair, assert_right, expected
from flowprefill_testing.http import at_once

pytestmark = pytest.mark.cluster

POOL = 6_600


@pytest.mark.parametrize("tightening", [True, False])
def test_three_prompts_of_which_two_fit(tight: Pair, stock_url: str, tightening: bool) -> None:
    """Each later one is more urgent, so that it is always the holders of memory who have to wait; and the reverse."""
    bodies = [prompts.ids(3_000, 700 + n + 10 * tightening) for n in range(3)]
    objectives = [90_000, 60_000, 30_000] if tightening else [30_000, 60_000, 90_000]
    answers: list[Answer] = []
    for number, (body, objective) in enumerate(zip(bodies, objectives, strict=True)):
        answers.append(tight.ask(body, name=f"p{number}", ttft_slo_ms=objective))
        tight.wait_for("arrived", answers[-1])
    assert_right(answers, bodies, stock_url)


def test_three_that_fit_only_alone(tight: Pair, stock_url: str) -> None:
    bodies = [prompts.ids(5_000, 720 + n) for n in range(3)]
    answers = [tight.ask(body, ttft_slo_ms=90_000 - 20_000 * n) for n, body in enumerate(bodies)]
    assert_right(answers, bodies, stock_url)


def test_cached_prefixes_make_room(tight: Pair, stock_url: str) -> None:
    """The pool is full of cached prompts; some are shared by those that come, the others have to go."""
    cached = [prompts.ids(2_900, 750), prompts.ids(2_900, 751)]
    for body in cached:
        tight.ask(body).whole()
    bodies = [cached[0] + prompts.ids(200, 752), prompts.ids(3_500, 753), cached[1] + prompts.ids(300, 754)]
    answers = [tight.ask(body, ttft_slo_ms=60_000 - 20_000 * n) for n, body in enumerate(bodies)]
    assert_right(answers, bodies, stock_url)


def test_a_prompt_that_can_never_fit_is_refused(tight: Pair) -> None:
    answer = tight.ask(prompts.ids(POOL + 200, 760))
    status, document = answer.prefill.result(60)
    assert status == 400, document
    tight.give_up(answer)
    assert tight.ask(prompts.ids(50)).whole()["output_ids"]


@pytest.mark.parametrize("below", range(1, 60, 12))
def test_a_prompt_at_the_edge_of_the_pool(tight: Pair, stock_url: str, below: int) -> None:
    """Served or refused, but never left waiting, and nobody waits for it."""
    body = prompts.ids(POOL - below, 770)
    answer = tight.ask(body)
    other = tight.ask(prompts.ids(60, 771 + below), ttft_slo_ms=90_000)
    status, document = answer.prefill.result(60)
    assert status in (200, 400), document
    other.whole()
    if status != 200:
        tight.give_up(answer)


def test_prompts_that_were_given_up_make_room(roomy: Pair, stock_url: str) -> None:
    """Six that are late from the start, each shorter than what remains of the one before it, hold most of the pool. For
    one that can be on time and needs more than is left, the longest of them is started over."""
    sizes = [8_000, 7_000, 6_100, 5_300, 4_600, 4_000]
    wait_until(lambda: roomy.control("/flush_cache")[0] == 200, timeout_s=30)
    bodies, urgent_ids = [prompts.ids(size, 780 + size) for size in sizes], prompts.ids(8_100, 790)
    late = [roomy.ask(bodies[0], name="late0", ttft_slo_ms=1)]
    for number, body in enumerate(bodies[1:], 1):  # handed over to nobody: the decode instance has no room for them all
        roomy.wait_for("started", late[-1])
        late.append(roomy.prefill_alone(body, name=f"late{number}", ttft_slo_ms=1))
    roomy.wait_for("started", late[-1])
    urgent = roomy.ask(urgent_ids, name="urgent", ttft_slo_ms=60_000)
    assert_right([urgent, late[0]], [urgent_ids, bodies[0]], stock_url)
    for answer, body in zip(late[1:], bodies[1:], strict=True):
        status, document = answer.prefill.result(60)
        assert (status, document["output_ids"]) == (200, expected(stock_url, body)[:1])
    steps = roomy.steps(urgent, *late)
    assert [name for kind, name in steps if kind == "retracted"] == ["late0"], steps
    assert steps.index(("retracted", "late0")) < steps.index(("started", "urgent"))
    assert steps.index(("finished", "urgent")) < steps.index(("finished", "late5")), "it waited for none of them"
    assert steps.count(("started", "late0")) == 2
    wait_until(lambda: roomy.load()["num_used_tokens"] == 0, timeout_s=30)


def test_a_burst_of_everything(tight: Pair, stock_url: str) -> None:
    """Sixteen at once, of all sizes and objectives, a few of them aborted."""
    sizes = [30, 200, 700, 1_030, 2_100, 3_300, 4_200, 5_100]
    bodies = [prompts.ids(sizes[n % len(sizes)], 800 + n) for n in range(16)]
    answers = [tight.ask(body, ttft_slo_ms=[50, 2_000, 20_000, 90_000][n % 4]) for n, body in enumerate(bodies)]
    aborted = set(range(6, 16, 5))

    def abort(number: int) -> None:
        tight.wait_for("arrived", answers[number])
        tight.control("/abort_request", {"rid": answers[number].rid})

    at_once(abort, sorted(aborted))
    for number, (answer, body) in enumerate(zip(answers, bodies, strict=True)):
        answer.prefill.result(120), answer.decode.result(120)
        if number not in aborted:
            assert answer.whole()["output_ids"] == expected(stock_url, body), len(body)
    wait_until(lambda: tight.load()["num_used_tokens"] == 0, timeout_s=30)
