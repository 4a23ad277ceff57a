from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.timeline_panels import Panel, RequestMarks, TaskRow, Window
from flowprefill_sglang.bench.timeline_window import most_telling_window
from flowprefill_sglang.observe.timeline import Segment


def marks(number: int, **changes: object) -> RequestMarks:
    fields = {"slo_class": "text", "tokens": 100, "arrived_at": float(number), "deadline_at": number + 0.5}
    return RequestMarks(number=number, **fields | {"first_token_at": number + 0.1} | changes)


def task(*requests: RequestMarks, segments: Sequence[tuple[float, float, bool]] = ()) -> TaskRow:
    return TaskRow(
        requests=requests, segments=tuple(Segment(start_at=a, end_at=b, is_running=r) for a, b, r in segments)
    )


def test_the_window_with_the_most_preemptions_wins() -> None:
    quiet = [task(marks(n, first_token_at=n + 0.9), segments=[(n, n + 0.1, True)]) for n in range(30)]
    stop_and_go = [(40 + n / 10, 40.05 + n / 10, n % 2 == 0) for n in range(9)]
    busy = task(marks(40, first_token_at=41.0), segments=stop_and_go)
    window = most_telling_window([Panel(title="", tasks=(*quiet, busy))], max_rows=5)
    assert window.start_at < 40
    assert window.end_at > 40.65, "the last preemption"


def test_nothing_after_the_end_is_shown() -> None:
    last = task(marks(3), segments=[(3, 4, True)])
    assert 4 < most_telling_window([Panel(title="", tasks=(last,))], max_rows=5).end_at < 5


def test_no_window_shows_more_rows_than_asked_for() -> None:
    crowd = tuple(task(marks(n, arrived_at=n / 10), segments=[(n / 10, n / 10 + 0.05, True)]) for n in range(300))
    one = Panel(title="", tasks=crowd)
    assert 5 < one.within(most_telling_window([one], max_rows=20)).rows() <= 20
    assert most_telling_window([Panel(title="", tasks=())], max_rows=5) == Window(start_at=0, end_at=1)


rows = st.lists(
    st.tuples(st.floats(0, 30), st.floats(0, 5), st.floats(0.01, 5), st.integers(1, 4)), min_size=1, max_size=25
)


@given(rows, rows, st.integers(1, 12))
def test_windows_are_chosen_by_what_they_show(one: list, other: list, max_rows: int) -> None:
    """The fast counts of the choice agree with what the chosen window then shows."""
    panels = [
        Panel(
            title="",
            tasks=tuple(
                task(*(marks(n, arrived_at=at) for n in range(size)), segments=[(at + wait, at + wait + run, True)])
                for at, wait, run, size in drawn
            ),
        )
        for drawn in (one, other)
    ]
    window = most_telling_window(panels, max_rows=max_rows)
    shortest = window.end_at - window.start_at < 0.26
    assert shortest or max(p.within(window).rows() for p in panels) <= max_rows
