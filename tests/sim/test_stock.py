"""SGLang's own admission, value in, value out."""

from __future__ import annotations

from flowprefill_sglang.prefill_worker.scheduler import Request
from flowprefill_sglang.sim.stock import StockQueue


def queue(
    *tokens: int, batch_tokens: int = 100, chunk_tokens: int | None = None, is_batching: bool = True
) -> StockQueue:
    made = StockQueue(batch_tokens=batch_tokens, chunk_tokens=chunk_tokens, is_batching=is_batching)
    for number, new_tokens in enumerate(tokens):
        made.waiting.append(
            Request(
                rid=str(number), slo_class="", new_tokens=new_tokens, cached_tokens=0, arrived_at=0.0, deadline_at=1.0
            )
        )
    return made


def batches(stock: StockQueue) -> list[list[tuple[str, int]]]:
    """Every batch until nothing is left, as (rid, tokens)."""
    found = []
    while True:
        requests, extents = stock.next_batch()
        if not requests:
            return found
        for request, extent in zip(requests, extents, strict=True):
            assert extent.cached_tokens == request.cached_tokens
            request.new_tokens -= extent.new_tokens
            request.cached_tokens += extent.new_tokens
        found.append([(one.rid, extent.new_tokens) for one, extent in zip(requests, extents, strict=True)])


def test_whole_prompts_join_in_order_while_they_fit() -> None:
    assert batches(queue(40, 50, 20, 5)) == [[("0", 40), ("1", 50)], [("2", 20), ("3", 5)]]
    assert batches(queue(40, 60, 5)) == [[("0", 40)], [("1", 60), ("2", 5)]], "SGLang wants less than what is left"
    assert batches(queue(500, 5)) == [[("0", 500)], [("1", 5)]], "the first goes whatever its length"


def test_chunks_are_shared_and_one_prompt_is_cut_at_a_time() -> None:
    assert batches(queue(250, 30, 90, chunk_tokens=100)) == [
        [("0", 100)],
        [("0", 100)],
        [("0", 50), ("1", 30), ("2", 20)],
        [("2", 70)],
    ]


def test_without_batching_each_goes_alone() -> None:
    assert batches(queue(10, 10, is_batching=False)) == [[("0", 10)], [("1", 10)]]
    assert batches(queue(150, 10, chunk_tokens=100, is_batching=False)) == [[("0", 100)], [("0", 50)], [("1", 10)]]
