from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flowprefill_sglang.bench.attainment_plot import draw_rates, draw_slo_scales
from flowprefill_sglang.bench.curves import Curve
from flowprefill_sglang.errors import StartupError

CURVES = [
    Curve(name=name, x=(0.5, 1.0, 2.0), attainment=(0.2 + lift, 0.5 + lift, 0.7 + lift))
    for name, lift in (("all", 0.1), ("text", 0.3), ("coder", 0.0))
]


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_slo_scales(tmp_path / "s.png", CURVES, 0.9, title="T", about="of a trace " * 20)
    draw_rates(tmp_path / "r.png", CURVES, 0.9, title="T", about="of a trace", is_logarithmic=True)
    for name in ("s.png", "r.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StartupError, match=r"pip install 'flowprefill-sglang\[plot\]'"):
        draw_rates(tmp_path / "r.png", CURVES, 0.9, title="T", about="")
