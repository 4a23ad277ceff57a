"""Which GPUs are there for members of this machine, who gets which, and when none are divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.cli.main import main
from flowprefill_sglang.cluster import gpus
from flowprefill_sglang.cluster.gpus import VARIABLE, Gpus, count_gpus, visible_gpus
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool_starting import pool_here
from flowprefill_sglang.errors import BadInput, StartupError

UUIDS = ("GPU-8932f937-d72c", "GPU-5ebe9f43-ac33")
SLICES = ("MIG-4f6e2a6b", "MIG-0b1d5b6e", "MIG-77c0a1d2")

NAMES = st.one_of(
    st.lists(st.integers(0, 15).map(str), unique=True, max_size=8),
    st.lists(st.uuids().map(lambda one: f"GPU-{one}"), unique=True, max_size=8),
    st.lists(st.uuids().map(lambda one: f"MIG-{one}"), unique=True, max_size=8),
)
OWNERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
STEPS = st.lists(st.tuples(st.sampled_from(OWNERS), st.one_of(st.none(), st.integers(0, 4))), max_size=30)
"""Somebody takes so many, or gives all back."""


@given(NAMES, STEPS)
def test_nobody_shares_and_everything_comes_back(names: list[str], steps: list[tuple[str, int | None]]) -> None:
    division = Gpus(names)
    held: dict[str, tuple[str, ...]] = {}
    for owner, count in steps:
        if count is None or owner in held:
            division.release(owner)
            held.pop(owner, None)
            continue
        free = [name for name in names if not any(name in taken for taken in held.values())]
        given_away = division.take(owner, count)
        if len(free) < count:
            assert given_away is None
        else:
            assert given_away == tuple(free[:count]), "the first that nobody has"
            held[owner] = given_away
    for owner in OWNERS:
        division.release(owner)
    assert division.take("all", len(names)) == tuple(names)


@given(
    st.integers(0, 12),
    st.fixed_dictionaries({"prefill": st.integers(1, 6), "decode": st.integers(1, 6)}),
    st.fixed_dictionaries({}, optional={"prefill": st.integers(1, 4), "decode": st.integers(1, 4)}),
)
def test_there_is_room_for_what_can_run_at_once(total: int, counts: dict[str, int], each: dict[str, int]) -> None:
    division = Gpus([str(index) for index in range(total)])
    given_away = [
        division.take(f"{kind}-{number}", each.get(kind, 0)) for kind in counts for number in range(counts[kind])
    ]
    if None not in given_away:
        division.require_room(counts, each)
    else:
        with pytest.raises(StartupError, match="this machine has no room for "):
            division.require_room(counts, each)


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (0, "0 GPUs are visible; without GPUs, pass --device cpu"),
        (1, "1 GPU is visible; members share them with --share-gpus"),
        (4, "4 GPUs are visible; members share them with --share-gpus"),
    ],
)
def test_what_is_said_without_room(total: int, words: str) -> None:
    division = Gpus([str(index) for index in range(total)])
    with pytest.raises(StartupError) as caught:
        division.require_room({"prefill": 2, "decode": 1}, {"prefill": 2, "decode": 1})
    assert str(caught.value) == f"this machine has no room for 2 prefill × 2 GPUs and 1 decode × 1 GPU: {words}"


@pytest.mark.parametrize(
    ("listed", "found", "expected"),
    [
        (None, 3, ("0", "1", "2")),
        (None, 0, ()),
        ("", 0, ()),
        ("2, 5,1", 3, ("2", "5", "1")),
        ("2,9,1", 1, ("2",)),
        (",".join(UUIDS), 2, UUIDS),
        (",".join((*UUIDS, "GPU-none")), 2, UUIDS),
        (",".join(SLICES), 1, SLICES),
        (",".join((*SLICES, *SLICES[:1], *UUIDS)), 1, SLICES),
        (",".join(SLICES), 0, ()),
    ],
)
def test_what_is_visible_here_is_there_for_members(listed: str | None, found: int, expected: tuple[str, ...]) -> None:
    assert visible_gpus(listed, lambda: found) == expected


def test_a_process_of_its_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count_gpus()
    assert counted >= 0
    monkeypatch.setattr(gpus, "_COUNT", f"import sys; print('a warning'); print({counted} + 7)")
    assert count_gpus() == counted + 7
    monkeypatch.setattr(gpus, "_COUNT", "raise ImportError('no torch here')")
    with pytest.raises(StartupError, match="torch cannot count this machine's GPUs: ImportError: no torch here"):
        count_gpus()
    monkeypatch.setattr(gpus, "_COUNT", "")
    with pytest.raises(StartupError, match="it said nothing"):
        count_gpus()
    monkeypatch.setattr(gpus, "_COUNT", "import time; time.sleep(60)")
    monkeypatch.setattr(gpus, "_COUNT_S", 0.01)
    with pytest.raises(StartupError, match=r"has not counted this machine's GPUs in 0\.01 s"):
        count_gpus()


TORCH_STAND_IN = """
import types
class cuda:
    device_count = staticmethod(lambda: 4)
version = types.SimpleNamespace(cuda={cuda})
"""


@pytest.mark.parametrize(("cuda", "counted"), [("'13.0'", 4), ("None", 0)])
def test_torch_is_asked_where_there_is_a_driver(
    cuda: str, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(TORCH_STAND_IN.format(cuda=cuda))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpus, "_COUNT", gpus._COUNT.replace("libcuda.so.1", "libc.so.6"))
    assert count_gpus() == counted


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClusterSpec]:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "config.json").write_text("{}")

    def make(*sglang: str, **more: object) -> ClusterSpec:
        return ClusterSpec(model_path=tmp_path, sglang_arguments=sglang, **more)

    return make


def never() -> int:
    raise AssertionError("nobody needs to know")


def divided(given: ClusterSpec, count: Callable[[], int]) -> tuple[tuple[str, ...], dict[str, int]]:
    """What the pool's host has to give, and to whom."""
    host = pool_here(given, count=count)._host
    return host._gpus._names, dict(host._gpus_each)


def test_members_get_as_many_as_they_have_ranks(
    spec: Callable[..., ClusterSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert divided(spec(prefill=2), lambda: 3) == (("0", "1", "2"), {"prefill": 1, "decode": 1})
    given = spec("--tp-size", "2", decode_arguments=("--tp-size", "4"))
    assert divided(given, lambda: 6)[1] == {"prefill": 2, "decode": 4}
    monkeypatch.setenv(VARIABLE, ",".join(UUIDS))
    assert divided(spec(), lambda: 2)[0] == UUIDS


def test_too_few_are_known_before_anything_starts(spec: Callable[..., ClusterSpec]) -> None:
    with pytest.raises(StartupError, match="no room for 2 prefill × 2 GPUs and 1 decode × 2 GPUs: 4 GPUs are visible"):
        pool_here(spec("--tp-size", "2", prefill=2), count=lambda: 4)
    with pytest.raises(StartupError, match="0 GPUs are visible; without GPUs, pass --device cpu"):
        pool_here(spec("--device", "cuda"), count=lambda: 0)


def test_up_says_so_in_one_line(
    spec: Callable[..., ClusterSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert (
        main(["up", "--model-path", str(spec().model_path), "--port", "0", "--device", "cuda", "--prefill", "2"]) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    words = "2 prefill × 1 GPU and 1 decode × 1 GPU: 0 GPUs are visible; without GPUs, pass --device cpu"
    assert line == f"flowprefill up: this machine has no room for {words}"


def test_without_gpus_nothing_is_divided(spec: Callable[..., ClusterSpec]) -> None:
    assert divided(spec(prefill=9), lambda: 0) == ((), {})
    assert divided(spec("--device", "cpu", "--base-gpu-id", "1", prefill=9), never) == ((), {})
    assert divided(spec("--base-gpu-id", "1", prefill=9, share_gpus=True), never) == ((), {})


def test_only_those_that_compute_on_gpus_take_some(spec: Callable[..., ClusterSpec]) -> None:
    given = spec(prefill=2, decode_arguments=("--device", "cpu"))
    assert divided(given, lambda: 2) == (("0", "1"), {"prefill": 1})


def test_flags_that_choose_among_all_gpus_are_refused(spec: Callable[..., ClusterSpec]) -> None:
    with pytest.raises(BadInput, match="--base-gpu-id 1: each member has GPUs of its own"):
        pool_here(spec(decode_arguments=("--base-gpu-id", "1")), count=never)
