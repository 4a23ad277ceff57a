from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from flowprefill_sglang.bench.timeline_panels import Panel, RequestMarks, TaskRow, Window
from flowprefill_sglang.bench.timeline_plot import (
    COLOURS,
    LATE,
    MIN_ROWS,
    check_suffix,
    draw_timeline,
    timeline_figure,
)
from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.observe.timeline import Segment

WINDOW = Window(start_at=0.0, end_at=10.0)


def request(number: int, slo_class: str, arrived_at: float, deadline_at: float, first_token_at: float) -> RequestMarks:
    return RequestMarks(
        number=number,
        slo_class=slo_class,
        tokens=1_000 * number,
        arrived_at=arrived_at,
        deadline_at=deadline_at,
        first_token_at=first_token_at,
    )


LONG = TaskRow(
    requests=(request(1, "file", 1.0, 9.0, 6.0),),
    segments=(
        Segment(start_at=1.5, end_at=3.0, is_running=True),
        Segment(start_at=3.0, end_at=4.0, is_running=False),
        Segment(start_at=4.0, end_at=6.0, is_running=True),
    ),
)
BATCH = TaskRow(
    requests=(request(2, "text", 2.5, 3.5, 4.0), request(3, "image", 2.8, 3.6, 3.5)),
    segments=(Segment(start_at=3.0, end_at=4.0, is_running=True),),
)
PANEL = Panel(title="FlowPrefill", tasks=(LONG, BATCH))


def figure(*panels: Panel) -> Figure:
    return timeline_figure(panels, WINDOW, title="What ran", about="All of it.")


def bars(of: Figure) -> list[tuple[float, float, str, bool]]:
    """Start, end, colour, and whether hatched, of each bar of a request in the first panel."""
    drawn = []
    for collection in of.axes[0].collections:
        if not hasattr(collection, "get_hatch") or collection.get_facecolor().size == 0:
            continue
        for path in collection.get_paths():
            box = path.get_extents()
            if 0 < box.height < 1:
                edge = to_hex(collection.get_edgecolor()[0])
                drawn.append((box.x0, box.x1, edge, bool(collection.get_hatch())))
    return [bar for bar in drawn if bar[2] in COLOURS.values()]


def test_running_parts_are_solid_and_suspended_ones_hatched() -> None:
    assert bars(figure(PANEL)) == [
        (1.5, 3.0, COLOURS["file"], False),
        (3.0, 4.0, COLOURS["file"], True),
        (4.0, 6.0, COLOURS["file"], False),
        (3.0, 4.0, COLOURS["text"], False),
        (3.0, 4.0, COLOURS["image"], False),
    ]


def test_arrivals_and_missed_deadlines_are_marked() -> None:
    lines = figure(PANEL).axes[0].lines
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines if line.get_marker() == ">"] == [
        (1.0, 0),
        (2.5, 1),
        (2.8, 2),
    ]
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0], line.get_color()) for line in crosses] == [(3.5, 1, LATE)]


def test_rows_are_labelled_with_request_class_and_length() -> None:
    axes = figure(PANEL).axes[0]
    assert [text.get_text().split() for text in axes.get_yticklabels()] == [
        ["#1", "file", "1,000"],
        ["#2", "text", "2,000"],
        ["#3", "image", "3,000"],
    ]
    assert [text.get_color() for text in axes.get_yticklabels()] == [COLOURS[c] for c in ("file", "text", "image")]


def test_panels_share_the_window_and_the_legend() -> None:
    drawn = figure(PANEL, Panel(title="stock", tasks=()))
    assert [axes.get_xlim() for axes in drawn.axes] == [(0.0, 10.0)] * 2
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["FlowPrefill", "stock"]
    (legend,) = drawn.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:4] == ["text", "image", "file", "suspended"]
    assert "deadline, missed" in names
    assert drawn.axes[1].get_ylim()[0] == pytest.approx(MIN_ROWS - 0.4), "an empty panel has a height too"


def test_classes_of_the_users_own_have_colours_of_their_own() -> None:
    own = [
        TaskRow(requests=(request(n, name, 1, 2, 1.5),), segments=BATCH.segments)
        for n, name in enumerate(("", "gold", "text"), start=1)
    ]
    labels = figure(Panel(title="", tasks=tuple(own))).axes[0].get_yticklabels()
    assert len({text.get_color() for text in labels}) == 3
    assert labels[2].get_color() == COLOURS["text"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_a_file_of_its_kind(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    draw_timeline(path, [PANEL], WINDOW, title="What ran", about="All of it.")
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(magic)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StartupError, match=r"pip install 'flowprefill-sglang\[plot\]'"):
        draw_timeline(tmp_path / "p.png", [PANEL], WINDOW, title="", about="")


def test_other_suffixes_are_wrong_use() -> None:
    check_suffix("-o", Path("a.png"))
    check_suffix("-o", Path("a.json"), also=(".json",))
    with pytest.raises(BadInput, match=r"-o: expected a file that ends in \.png, \.svg, \.pdf, got 'a\.jpeg'"):
        check_suffix("-o", Path("a.jpeg"))
