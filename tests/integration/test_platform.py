"""Which platform SGLang gets, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowprefill_sglang.integration import platform
from flowprefill_testing.sglang_process import facts_of

NAME = "flowprefill_sglang.integration.cpu_platform.TorchCpuPlatform"


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    monkeypatch.setattr(platform, "define_torchvision_schemas", lambda: None)


@pytest.mark.usefixtures("no_accelerator")
def test_a_cpu_is_the_embedded_default() -> None:
    assert platform.activate() == NAME


@pytest.mark.usefixtures("no_accelerator")
def test_it_steps_aside_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    assert platform.activate() is None


@pytest.mark.usefixtures("no_accelerator")
def test_it_steps_aside_for_sglangs_own_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_every_kind_of_accelerator_counts(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    for name, module in kinds.items():
        monkeypatch.setattr(module, "is_available", lambda name=name: name == kind)
    assert platform.has_accelerator()
    monkeypatch.setattr(kinds[kind], "is_available", lambda: False)
    assert not platform.has_accelerator()


DEFINES_SCHEMAS = """
    import torch
    from flowprefill_sglang.integration import platform
    {before}
    for _ in range(2):
        platform.define_torchvision_schemas()
    facts["registrations"] = len(platform._torchvision_schemas)
    facts["schemas"] = [str(torch.ops.torchvision.nms.default._schema)]
"""


def test_the_missing_schemas_are_defined_once() -> None:
    facts = facts_of(DEFINES_SCHEMAS.format(before=""), is_fresh=True)
    assert facts["registrations"] == 1
    assert facts["schemas"] == ["torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"]


def test_a_torchvision_that_works_is_left_alone() -> None:
    before = """library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor theirs) -> Tensor")"""
    facts = facts_of(DEFINES_SCHEMAS.format(before=before), is_fresh=True)
    assert facts == {"registrations": 0, "schemas": ["torchvision::nms(Tensor theirs) -> Tensor"]}


@pytest.mark.parametrize(("version", "registrations"), [("0.28.0+cu130", 1), ("0.28.0+cpu", 0), ("0.28.0", 0)])
def test_only_a_cuda_build_needs_the_schemas(tmp_path: Path, version: str, registrations: int) -> None:
    """Any other defines them when it is imported, and would fail if they were there."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from flowprefill_sglang.integration import platform
        platform.define_torchvision_schemas()
        facts["registrations"] = len(platform._torchvision_schemas)
    """
    facts = facts_of(script, is_fresh=True)
    assert facts["registrations"] == registrations


# ---- as SGLang sees it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """Of a process that does what ``python -m sglang.launch_server`` does: nothing of ours is imported by name."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    if platform.has_accelerator():
        pytest.skip("the embedded default steps aside here")
    script = """
        from types import SimpleNamespace
        from sglang.srt.platforms import current_platform

        facts["class"] = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
        facts["device"] = repr(current_platform.get_device())
        facts["attention"] = current_platform.get_default_attention_backend()
        facts["dispatch"] = current_platform.get_dispatch_key_name()
        facts["pinned"] = current_platform.is_pin_memory_available()

        def resolved(**given):
            unset = {"dtype": "auto", "max_total_tokens": None, "mem_fraction_static": None}
            unset |= {"tp_size": 1, "pp_size": 1, "dp_size": 1}
            server_args = SimpleNamespace(**unset | {"disaggregation_mode": "null"} | given)
            current_platform.apply_server_args_defaults(server_args)
            return vars(server_args)

        facts["defaults"] = resolved()
        facts["given"] = resolved(dtype="bfloat16", max_total_tokens=100, mem_fraction_static=0.5)
    """
    return facts_of(script, is_fresh=True)


def test_unmodified_sglang_gets_the_platform(seen: dict[str, Any]) -> None:
    assert seen["class"] == NAME


def test_the_device_is_a_string(seen: dict[str, Any]) -> None:
    assert seen["device"] == "'cpu'"


def test_nothing_but_pytorch_is_needed(seen: dict[str, Any]) -> None:
    assert (seen["attention"], seen["dispatch"], seen["pinned"]) == ("torch_native", "native", False)


def test_defaults_give_way_to_what_the_user_set(seen: dict[str, Any]) -> None:
    always = {"disable_overlap_schedule": True, "sleep_on_idle": True, "disaggregation_mode": "null"}
    always |= {"tp_size": 1, "pp_size": 1, "dp_size": 1}
    assert seen["defaults"] == {"dtype": "float32", "max_total_tokens": 65_536, "mem_fraction_static": 0.8} | always
    assert seen["given"] == {"dtype": "bfloat16", "max_total_tokens": 100, "mem_fraction_static": 0.5} | always


SHARES = """
    import os

    os.sched_getaffinity = lambda pid: {0, 1, 2}
    from sglang.srt.utils import common

    common.get_cpu_ids_by_node = lambda: ["0,1,2"]
    from flowprefill_sglang.integration.cpu_platform import share_cores

    for ranks in (1, 2, 4):
        share_cores(ranks, facts.setdefault(f"{ranks}", {}))
    facts["told"] = {"SGLANG_CPU_OMP_THREADS_BIND": "2|1"}
    share_cores(2, facts["told"])
"""


def test_ranks_share_the_cores_of_one_node() -> None:
    variable = "SGLANG_CPU_OMP_THREADS_BIND"
    assert facts_of(SHARES) == {
        "1": {},
        "2": {variable: "0|1,2"},
        "4": {variable: "0|0|1|2"},
        "told": {variable: "2|1"},
    }
