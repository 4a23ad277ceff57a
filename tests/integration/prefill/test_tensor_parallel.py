"""Ranks in processes of their own, with real shared memory and gloo: they stop together, and end together."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the ranks' collectives are torch's")

from flowprefill_testing.rank_process import Work, run_alone, run_group


@pytest.mark.parametrize("ranks", [2, 4])
def test_thousands_of_preemptions(ranks: int, tmp_path: Path) -> None:
    work = Work(tasks=4, operators=800, event_chance=0.9)
    ended, codes = run_group(ranks, work, tmp_path, within_s=120)
    assert [rank.error for rank in ended] == [""] * ranks
    assert codes == [0] * ranks
    assert len(ended[0].stops) > 2_000
    alone = run_alone(work)
    for rank in ended:
        assert rank.stops == ended[0].stops
        for output, expected in zip(rank.outputs, alone, strict=True):
            assert output == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (4, 2), (4, 0)])
@pytest.mark.parametrize("event_chance", [0.0, 0.9], ids=["running", "stopping"])
def test_a_rank_that_is_killed_ends_the_others(ranks: int, victim: int, event_chance: float, tmp_path: Path) -> None:
    work = Work(tasks=2, operators=4_000, event_chance=event_chance, victim=victim, dies_at=501)
    began_at = time.monotonic()
    ended, codes = run_group(ranks, work, tmp_path, within_s=60)
    assert time.monotonic() - began_at < 50
    for rank, (left, code) in enumerate(zip(ended, codes, strict=True)):
        if rank == victim:
            assert code == -9
        else:
            assert code == 1
            assert left.error.startswith("PeerFault: "), left.error
            assert "has ended" in left.error
