"""Cost models on disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from flowprefill_sglang.core.cost_file import CostFile, HardwareKey, ModelKey, default_path, load, save
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import StartupError

MODEL = ModelKey(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    tp_size=2,
    attention_backend="FlashInferAttnBackend",
    shape_digest="0123456789abcdef",
)
HARDWARE = HardwareKey(device="cuda", name="NVIDIA H200")
COSTS = CostModel(base_s=0.01, short_token_s=0.0, long_token_s=4e-5, knee_tokens=300, pair_s=1.234567890123e-9)
CONTENT = CostFile(format=1, model=MODEL, hardware=HARDWARE, coefficients=COSTS)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "cost.json"
    save(path, CONTENT, {"held_out": {"median_error": 0.03}, "samples": [1, 2]})
    assert load(path, MODEL, HARDWARE) == COSTS
    assert load(path) == COSTS
    assert json.loads(path.read_text())["held_out"] == {"median_error": 0.03}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "hardware", "expected"),
    [
        (msgspec.structs.replace(MODEL, tp_size=4), HARDWARE, "model tp_size is 2 there and 4 here"),
        (MODEL, HardwareKey(device="cuda", name="NVIDIA L4"), "hardware name is 'NVIDIA H200' there and 'NVIDIA L4'"),
        (MODEL, HardwareKey(device="cpu", name="NVIDIA H200", threads=2), "hardware threads is 0 there and 2 here"),
    ],
)
def test_a_file_of_something_else_is_refused(
    model: ModelKey, hardware: HardwareKey, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "cost.json"
    save(path, CONTENT)
    with pytest.raises(StartupError, match=re.escape(expected)) as caught:
        load(path, model, hardware)
    assert str(path) in str(caught.value)
    assert "flowprefill profile" in str(caught.value)


def changed(**changes: object) -> bytes:
    return json.dumps(msgspec.to_builtins(CONTENT) | changes).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "truncated"),
        (b'{"format": 1', "truncated"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (changed(coefficients={"base_s": 1.0}), r"missing required field `short_token_s` - at `\$.coefficients`"),
        (changed(coefficients=msgspec.to_builtins(COSTS) | {"pair_s": -1.0}), "pair_s=-1.0"),
        (changed(coefficients=msgspec.to_builtins(COSTS) | {"per_moon_s": 1.0}), "unknown field `per_moon_s`"),
        (changed(format=2), "format 2, this version reads 1"),
        (changed(hardware={"device": "cpu"}), r"missing required field `name` - at `\$.hardware`"),
    ],
)
def test_a_broken_file_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=expected) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot read the cost model .*cost\.json: No such file"):
        load(tmp_path / "cost.json")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="cannot write the cost model"):
        save(tmp_path / "file" / "cost.json", CONTENT)


def test_where_files_are_kept(tmp_path: Path) -> None:
    here = {"FLOWPREFILL_COST_DIR": str(tmp_path)}
    path = default_path(MODEL, HARDWARE, here)
    assert path.parent == tmp_path
    assert path.name.startswith("LlamaForCausalLM-NVIDIA-H200-tp2-")
    others = [
        default_path(msgspec.structs.replace(MODEL, shape_digest="f" * 16), HARDWARE, here),
        default_path(MODEL, msgspec.structs.replace(HARDWARE, threads=1), here),
    ]
    assert len({path, *others}) == 3
    assert default_path(MODEL, HARDWARE, {"XDG_CACHE_HOME": "/c"}).parent == Path("/c/flowprefill/cost")
    assert default_path(MODEL, HARDWARE, dict(os.environ)) == default_path(MODEL, HARDWARE)
