"""Cost models by name and file, and what a roofline says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from flowprefill_sglang.core.cost_file import CostFile, HardwareKey, ModelKey, save
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim.cost_models import DEFAULT_COST_MODEL, built_in, load_machine
from flowprefill_sglang.sim.roofline import Roofline

DATA = Path(__file__).parents[2] / "flowprefill_sglang" / "sim" / "data"


def figures(folder: str, name: str) -> dict[str, object]:
    return json.loads((DATA / folder / f"{name}.json").read_text())


@pytest.mark.parametrize("gpu", built_in("gpus"))
@pytest.mark.parametrize("model", built_in("models"))
def test_every_built_in_loads(model: str, gpu: str) -> None:
    machine = load_machine(f"{model}-tp2-{gpu}")
    assert 0 < machine.alone_s(100) < machine.alone_s(10_000) < 60
    assert sum(one.token_share for one in machine.operators) == pytest.approx(1)
    assert sum(one.pair_share for one in machine.operators) == pytest.approx(1)


def test_llama_by_hand() -> None:
    """Llama-3-8B on one A800: 6.98 billion parameters in the layers, at 156 TFLOP/s."""
    machine = load_machine(DEFAULT_COST_MODEL)
    parameters = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert machine.cost.long_token_s == pytest.approx(2 * parameters / 156e12)
    assert machine.cost.pair_s == pytest.approx(4 * 4096 * 32 / 156e12)
    read_s = 2 * (parameters + 4096 * 128_256) / (2.039e12 * 0.8)
    assert machine.cost.base_s == pytest.approx(5e-3 + 32 * 5 * 2e-5 + read_s)
    assert machine.handoff_s(1000) == pytest.approx(2e-3 + 1000 * 131_072 / 20e9)


def test_tensor_parallelism_divides_the_work_and_adds_exchange() -> None:
    one, four = load_machine("llama-3-70b-tp1-a800"), load_machine("llama-3-70b-tp4-a800")
    assert four.cost.pair_s == pytest.approx(one.cost.pair_s / 4)
    assert one.cost.long_token_s / 4 < four.cost.long_token_s < one.cost.long_token_s / 3
    assert one.cost.short_token_s == 0 < four.cost.short_token_s


def test_experts_are_all_read_and_few_computed() -> None:
    shape, gpu = figures("models", "llama-3-8b"), figures("gpus", "a800")
    dense = msgspec.convert({"model": shape, "gpu": gpu}, Roofline).machine()
    experts = shape | {"experts": 8, "experts_per_token": 2}
    sparse = msgspec.convert({"model": experts, "gpu": gpu}, Roofline).machine()
    assert sparse.cost.base_s > 3 * dense.cost.base_s
    assert dense.cost.long_token_s < sparse.cost.long_token_s < 2 * dense.cost.long_token_s
    assert [one.name for one in sparse.operators] == ["qkv_proj", "attention", "o_proj", "moe"]


def test_a_file_of_profile(tmp_path: Path) -> None:
    cost = CostModel(base_s=0.01, short_token_s=1e-4, long_token_s=2e-4, pair_s=1e-8)
    model = ModelKey(architecture="A", dtype="f", kv_dtype="f", tp_size=1, attention_backend="t", shape_digest="0")
    save(
        tmp_path / "cost.json",
        CostFile(format=1, model=model, hardware=HardwareKey(device="cpu", name="C"), coefficients=cost),
    )
    machine = load_machine(str(tmp_path / "cost.json"), layers=7)
    assert (machine.cost, machine.layers, machine.handoff_s(1000)) == (cost, 7, 0.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"layers": 0}}, "Expected `int` >= 1 - at `$.model.layers`"),
        ({"model": {"width": 3}}, "unknown field `width` - at `$.model`"),
        ({"gpu": {"efficiency": 1.5}}, "Expected `float` <= 1.0 - at `$.gpu.efficiency`"),
        ({"model": {"experts_per_token": 2}}, "experts_per_token 2 is more than experts 1"),
    ],
)
def test_a_wrong_roofline_is_refused(tmp_path: Path, change: dict[str, dict[str, object]], expected: str) -> None:
    document = {"model": figures("models", "llama-3-8b"), "gpu": figures("gpus", "a800")}
    for part, values in change.items():
        document[part] = document[part] | values
    path = tmp_path / "roofline.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput) as caught:
        load_machine(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"coefficients": 3}', "\udcff"])
def test_what_is_no_cost_model(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match="is no cost model"):
        load_machine(str(path))


@pytest.mark.parametrize("name", ["nothing", "llama-3-8b", "llama-3-8b-tp0-a800", "llama-3-8b-tp1-b200", "x-tp1-a800"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(BadInput, match=r"no file and no built-in.*llama-3-8b.*a800, h800"):
        load_machine(name)
