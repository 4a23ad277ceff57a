"""What a member takes of a cluster, and which lines a follower has not seen."""

from pathlib import Path

import pytest

from flowprefill_sglang.cluster.control import lines_after
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.members import arguments_of, resource_of


def spec(*sglang: str, threads: int | None = None, prefill: tuple[str, ...] = ()) -> ClusterSpec:
    return ClusterSpec(model_path=Path("/m"), sglang_arguments=sglang, prefill_arguments=prefill, threads=threads)


@pytest.mark.parametrize(
    ("given", "takes"),
    [
        (spec(), ("GPU", 1)),
        (spec("--tp-size", "4"), ("GPU", 4)),
        (spec("--tensor-parallel-size=2"), ("GPU", 2)),
        (spec("--tp", "2", prefill=("--tp-size", "8")), ("GPU", 8)),
        (spec("--device", "cpu"), ("CPU", 1)),
        (spec("--device", "cpu", "--tp", "2", threads=3), ("CPU", 6)),
        (spec("--device", "cpu", "--device", "cuda"), ("GPU", 1)),
    ],
)
def test_one_gpu_a_rank_or_cores(given: ClusterSpec, takes: tuple[str, int]) -> None:
    assert resource_of(given, "prefill") == takes


def test_the_key_reaches_every_member_and_prefill_flags_only_prefill() -> None:
    given = ClusterSpec(model_path=Path("/m"), api_key="k", prefill_arguments=("--p",), decode_arguments=("--d",))
    assert arguments_of(given, "prefill") == ("--model-path", "/m", "--api-key", "k", "--p")
    assert arguments_of(given, "decode") == ("--model-path", "/m", "--api-key", "k", "--d")


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("a\nb", "a\nb", []),
        ("a\nb", "a\nb\nc", ["c"]),
        ("b", "a\nb\nb\nc", ["c"]),
        ("a\nb\nc", "b\nc\nd", ["d"]),
        ("", "a", ["a"]),
        ("old", "new", ["new"]),
    ],
)
def test_following_a_log_shows_each_line_once(before: str, now: str, new: list[str]) -> None:
    assert lines_after(before, now) == new
