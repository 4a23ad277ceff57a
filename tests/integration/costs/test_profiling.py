"""Timed forwards on a real SGLang model, and the cost model that a worker gets from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_tiny_model
from flowprefill_testing.sglang_process import facts_of

SCRIPT = """
    import sys
    from pathlib import Path

    from flowprefill_sglang.core.cost_file import CostFile, default_path, save
    from flowprefill_sglang.core.prefill_cost import CostModel, Extent
    from flowprefill_sglang.errors import OutOfCapacity, StartupError
    from flowprefill_sglang.integration.costs.cost_model import cost_model, hardware_key, limits, model_key
    from flowprefill_sglang.integration.offline_forward import OfflineEngine
    from flowprefill_sglang.integration.costs.profiling import ForwardTimer

    engine = OfflineEngine({model!r}, max_total_tokens=2000, mem_fraction_static=0.3, log_level="error")
    scheduler, runner = engine.scheduler, engine.model_runner
    rows = scheduler.req_to_token_pool
    before = engine.free_tokens(), rows.available_size()
    ran = []
    original = runner.forward
    def forward(batch, *args, **kwargs):
        ran.append([batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu])
        return original(batch, *args, **kwargs)
    runner.forward = forward

    timer = ForwardTimer(runner, scheduler.tree_cache)
    facts["seconds"] = [timer(batch) for batch in (
        [Extent(100)], [Extent(50, 200)], [Extent(7), Extent(30, 64), Extent(20, 1)]
    )]
    facts["ran"] = [[list(map(int, lengths)) for lengths in lists] for lists in ran]
    try:
        timer([Extent(100, 1800), Extent(1000)])
    except OutOfCapacity as error:
        facts["too_large"] = str(error)
    facts["kept"] = [before, (engine.free_tokens(), rows.available_size())]

    path = default_path(model_key(runner), hardware_key(runner))
    facts["path"] = str(path)
    ran.clear()
    measured = cost_model(scheduler, None)
    facts["calibration_forwards"] = len(ran)
    facts["predicted"] = measured.seconds([Extent(100)])
    facts["kept_after_calibration"] = [before, (engine.free_tokens(), rows.available_size())]

    made_up = CostModel(base_s=1.0, short_token_s=0.5, long_token_s=0.25, pair_s=0.125)
    content = CostFile(format=1, model=model_key(runner), hardware=hardware_key(runner), coefficients=made_up)
    save(path, content)
    ran.clear()
    facts["found_there"] = cost_model(scheduler, None) == made_up and not ran
    other = Path(path).with_name("other.json")
    other.write_bytes(path.read_bytes().replace(b'"cpu"', b'"gpu"'))
    try:
        cost_model(scheduler, str(other))
    except StartupError as error:
        facts["refused"] = str(error)
    facts["limits"] = [limits(runner, None, 1.0).max_new_tokens, limits(runner, 512, 1.0).max_new_tokens]
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profiling")
    model = make_tiny_model(folder, TinyModelShape(num_hidden_layers=2, max_position_embeddings=2048))
    environ = {"FLOWPREFILL_COST_DIR": str(folder / "cost"), "OMP_NUM_THREADS": "1"}
    return facts_of(SCRIPT.replace("{model!r}", repr(str(model))), **environ)


pytestmark = pytest.mark.cluster


def test_what_was_asked_for_ran(facts: dict[str, Any]) -> None:
    assert facts["ran"] == [[[100], [0]], [[50], [200]], [[7, 30, 20], [0, 64, 1]]]
    assert all(0 < seconds < math.inf for seconds in facts["seconds"])


def test_a_batch_that_does_not_fit(facts: dict[str, Any]) -> None:
    assert facts["too_large"].startswith("a batch of 2 requests and 2900 tokens, where ")
    assert facts["too_large"].endswith(" and 2000 tokens fit")


def test_nothing_is_left_behind(facts: dict[str, Any]) -> None:
    assert facts["kept"][0] == facts["kept"][1]
    assert facts["kept_after_calibration"][0] == facts["kept_after_calibration"][1]


def test_without_a_file_it_is_calibrated(facts: dict[str, Any]) -> None:
    assert facts["calibration_forwards"] >= 10
    assert facts["predicted"] == pytest.approx(facts["seconds"][0], rel=5)  # the machine may be busy


def test_the_file_of_this_model_and_hardware_is_used(facts: dict[str, Any]) -> None:
    assert facts["found_there"]
    assert Path(facts["path"]).name.startswith("LlamaForCausalLM-")


def test_a_file_of_other_hardware_is_refused(facts: dict[str, Any]) -> None:
    assert "hardware device is 'gpu' there and 'cpu' here" in facts["refused"]


def test_chunks_bound_what_is_measured(facts: dict[str, Any]) -> None:
    assert facts["limits"] == [1999, 512]
