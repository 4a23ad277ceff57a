"""``flowprefill bench`` against the real cluster, over both of its protocols."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowprefill_testing.clusters import Cluster

pytestmark = pytest.mark.cluster

QWEN = [
    {"chat_id": n, "parent_chat_id": -1, "timestamp": 0.2 * n, "input_length": 64 + 16 * n, "output_length": 4,
     "type": "text" if n % 3 else "file", "turn": 1, "hash_ids": [0, 1, 2, 100 + n]}
    for n in range(12)
]  # fmt: skip


def flowprefill(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowprefill_sglang", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def bench_in_time(*words: object) -> subprocess.CompletedProcess[str]:
    """Until the client was not late: it refuses then, and a machine that runs tests is busy."""
    for _ in range(10):
        done = flowprefill("bench", *words)
        if "fell behind" not in done.stderr:
            break
    return done


@pytest.mark.parametrize("endpoint", ["generate", "completions", "chat"])
def test_bench_and_compare(cluster: Cluster, tmp_path: Path, endpoint: str) -> None:
    trace = tmp_path / "qwen.jsonl"
    trace.write_text("\n".join(map(json.dumps, QWEN)))
    load = ("--trace", trace, "--format", "qwen", "--endpoint", endpoint, "--slo", "text=4000", "--slo", "file=8000")
    results = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in results:
        done = bench_in_time("--url", cluster.url, *load, "--json", path)
        assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(results[0].read_text())
    assert (document["requests"], document["succeeded"], document["client_late"]) == (12, 12, False)
    assert {name: c["count"] for name, c in document["classes"].items()} == {"text": 8, "file": 4}
    assert document["attainment"] == 1.0
    assert all(record["first_token_at"] > record["sent_at"] for record in document["records"])
    compared = flowprefill("bench", "compare", *results)
    assert compared.returncode == 0, compared.stderr
    assert "one repeat each" in compared.stdout
