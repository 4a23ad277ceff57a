from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

from flowprefill_sglang.bench.provenance import provenance, without_folders

REPOSITORY = Path(__file__).resolve().parents[2]


def test_it_says_what_ran_where_and_when() -> None:
    document = provenance(["flowprefill", "demo"], datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert document["started_at"] == "2026-01-02T03:04:05+00:00"
    assert document["command"] == ["flowprefill", "demo"]
    assert document["hardware"]["cores"] >= 1
    assert {"python", "flowprefill-sglang"} <= set(document["versions"])
    if (REPOSITORY / ".git").exists():
        head = subprocess.run(
            ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert document["commit"].removesuffix("+changes") == head.stdout.strip()
    else:
        assert document["commit"] is None


def test_commands_are_told_without_the_folders_of_this_machine() -> None:
    words = [
        "flowprefill",
        "bench",
        "--url",
        "http://127.0.0.1:3000/x",
        "--trace",
        "/home/a/t.csv",
        "--json",
        "o/r.json",
    ]
    told = ["flowprefill", "bench", "--url", "http://127.0.0.1:3000/x", "--trace", "t.csv", "--json", "r.json"]
    assert without_folders(words) == told
