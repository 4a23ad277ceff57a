"""What a terminal shows of a start, and what a log keeps of it."""

import io

import pytest

from flowprefill_sglang.cli.start_display import EVERY_S, StartDisplay
from flowprefill_sglang.cluster.launcher import LaunchEvent


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def loading(elapsed_s: float, detail: str, name: str = "prefill-0") -> LaunchEvent:
    return LaunchEvent(name, "loading", elapsed_s, detail, is_step=False)


def test_without_a_terminal_each_member_has_a_line_every_ten_seconds() -> None:
    out = io.StringIO()
    show = StartDisplay(out)
    show(LaunchEvent("prefill-0", "loading", 1.0, "pid 7"))
    show(LaunchEvent("decode-0", "loading", 5.0))
    for second in range(2, 40, 2):
        show(loading(float(second), f"for {second} s: weights: 1 of 4 files"))
    show(loading(5.0 + EVERY_S, "for 10 s: Init parallel begin.", "decode-0"))
    show(LaunchEvent("prefill-0", "ready", 41.0, "http://h:1"))
    assert out.getvalue().splitlines() == [
        "[   1.0 s] prefill-0  loading     pid 7",
        "[   5.0 s] decode-0   loading",
        "[  12.0 s] prefill-0  loading     for 12 s: weights: 1 of 4 files",
        "[  22.0 s] prefill-0  loading     for 22 s: weights: 1 of 4 files",
        "[  32.0 s] prefill-0  loading     for 32 s: weights: 1 of 4 files",
        "[  15.0 s] decode-0   loading     for 10 s: Init parallel begin.",
        "[  41.0 s] prefill-0  ready       http://h:1",
    ]


def test_a_terminal_has_one_line_that_lives_below_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    out = Terminal()
    show = StartDisplay(out)
    show(loading(2.0, "for 1 s: a"))
    show(loading(2.1, "for 1 s: b", "decode-0"))
    show(loading(4.0, "for 3 s: " + "c" * 100))
    show(LaunchEvent("prefill-0", "ready", 5.0))
    shown = out.getvalue().split("\r\x1b[2K")
    assert shown == [
        "",
        "prefill-0 for 1 s: a",
        "prefill-0 for 1 s: a   decode-0 for 1 s: b",
        ("prefill-0 for 3 s: " + "c" * 100)[:49],
        "[   5.0 s] prefill-0  ready\n",
        "decode-0 for 1 s: b",
    ]
    assert "\n" not in "".join(shown[:4]), "it is written over"
