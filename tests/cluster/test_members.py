"""What a member takes of a cluster, and which lines a follower has not seen."""

from pathlib import Path

import pytest

from flowprefill_sglang.cluster.control import lines_after
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.members import arguments_of, resource_of
from flowprefill_sglang.errors import BadInput


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
        (spec("--tp-size", "2", "--pp-size=3", "--dp", "4"), ("GPU", 24)),
        (spec("--tp-size", "4", "--dp-size", "2", "--enable-dp-attention"), ("GPU", 4)),
        (spec("--base-gpu-id", "0", "--gpu-id-step=1"), ("GPU", 1)),
        (spec("--device", "cpu", "--base-gpu-id", "3"), ("CPU", 1)),
    ],
)
def test_one_gpu_a_rank_or_cores(given: ClusterSpec, takes: tuple[str, int]) -> None:
    assert resource_of(given, "prefill") == takes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--base-gpu-id", "2"), r"--base-gpu-id 2: each member has GPUs of its own, .* CUDA_VISIBLE_DEVICES"),
        (("--gpu-id-step=2",), r"--gpu-id-step 2: each member has GPUs of its own"),
        (("--tp-size", "two"), r"--tp-size two: expected a whole number of at least 1"),
        (("--pipeline-parallel-size", "0"), r"--pp-size 0: expected a whole number of at least 1"),
    ],
)
def test_flags_that_do_not_go_with_gpus_of_ones_own_are_refused(flags: tuple[str, ...], words: str) -> None:
    for given in (spec(*flags), spec(prefill=flags)):
        with pytest.raises(BadInput, match=words):
            resource_of(given, "prefill")
    assert resource_of(spec(prefill=flags), "decode") == ("GPU", 1), "they are the prefill workers' alone"


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
