"""Each example runs as it is, and what it returns hangs together."""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_testing.clusters import Cluster
from flowprefill_testing.http import post

pytestmark = pytest.mark.cluster

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def greedy(url: str, prompt: str, tokens: int) -> str:
    status, answer = post(
        f"{url}/generate", {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}}
    )
    assert status == 200, answer
    return answer["text"]


def test_http_client(cluster: Cluster) -> None:
    answers = load("http_client").main(cluster.url)
    assert answers["whole"] == answers["streamed"] == greedy(cluster.url, "Prefill is ", 24)
    assert len(answers["whole"]) == 24


def test_openai_client(cluster: Cluster) -> None:
    answers = load("openai_client").main(cluster.url)
    assert answers["streamed"] == greedy(cluster.url, "Prefill is ", 24)
    assert answers["urgent"] == greedy(cluster.url, "Answer within half a second: ", 8)
    assert len(answers["chat"]) == 24


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_cluster(cluster: Cluster, model_path: Path) -> None:
    pytest.importorskip("ray")
    flags = ("--device", "cpu", "--context-length", "4096", "--max-total-tokens", "20000")
    spec = ClusterSpec(model_path=model_path, sglang_arguments=flags)
    text = asyncio.run(load("ray_cluster").ask_a_pool(spec))
    assert text == greedy(cluster.url, "Prefill is ", 24)


def test_frontend_language(cluster: Cluster) -> None:
    found = load("frontend_language").main(cluster.url)
    assert found["mood"] in ("good", "bad", "mixed")
    assert found["streamed"] == found["summary"]
    assert len(found["summary"]) == 16
    prompt, _, rest = found["text"].partition("In short: ")
    assert rest == found["summary"] == greedy(cluster.url, prompt + "In short: ", 16)
    assert f"Mood: {found['mood']}\nFor: " in prompt
