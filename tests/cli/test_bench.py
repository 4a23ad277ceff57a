"""``flowprefill bench`` and ``bench compare``: flags, exit status and results, against a stand-in for the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowprefill_sglang.cli.main import main
from flowprefill_testing.streaming_server import StreamingServer, served_in_background

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 * second},44\n" for second in range(1, 11)
)
LOAD = ("--rate", "100", "--slo", "text=500", "--slo", "image=500", "--warm-up", "1")
PER_CLASS = {"count", "slo_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "attainment"}


@pytest.fixture
def server() -> StreamingServer:
    return StreamingServer()


@pytest.fixture
def url(server: StreamingServer) -> Iterator[str]:
    with served_in_background(server) as address:
        yield address


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    return path


def bench(url: str, trace: Path, *more: object) -> int:
    return main(["bench", "--url", url, "--trace", str(trace), "--format", "azure", *LOAD, *map(str, more)])


def test_a_trace_is_played_and_summed_up(
    url: str, trace: Path, server: StreamingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(url, trace, "--limit", 9, "--length-scale", 0.5, "--json", tmp_path / "r.json") == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert (document["requests"], document["succeeded"], document["client_late"]) == (9, 9, False)
    assert document["attainment"] == 1.0
    assert document["goodput_rps"] > 0
    assert {name: c["count"] for name, c in document["classes"].items()} == {"text": 8, "image": 1}
    assert all(set(c) >= PER_CLASS for c in document["classes"].values())
    assert document["workload"]["sha256"] is not None
    assert {"commit", "versions", "hardware", "command", "seed", "records", "started_at"} <= set(document)
    assert [record["scheduled_at"] for record in document["records"]] == pytest.approx([0.01 * n for n in range(9)])
    assert len(server.bodies) == 10
    captured = capsys.readouterr()
    assert "9 of 9 requests succeeded" in captured.out
    assert captured.err == "", "no progress bar where there is no terminal"


def test_repeats_rates_search_and_plots(
    url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = tmp_path / "plots"
    searches = ("--repeats", 2, "--rates", "50,200", "--max-goodput", "--probes", 2, "--slo-scales", "0.5,1")
    assert bench(url, trace, *searches, "--plot", plots, "--json", tmp_path / "r.json") == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert (document["requests"], len(document["repeats"])) == (20, 2)
    assert {0.5, 1.0} == {x for x, _ in document["attainment_by_slo_scale"]["all"]}
    assert {50.0, 100.0, 200.0} <= {x for x, _ in document["attainment_by_rate"]["all"]}
    assert len(document["max_goodput"]["repeats"]) == 2
    assert {path.name for path in plots.iterdir()} == {"attainment-slo-scale.png", "attainment-rate.png"}
    out = " ".join(capsys.readouterr().out.split())
    assert "over 2 repeats: attainment 100%" in out
    assert "max goodput, the rate at which 90% of requests are in time" in out
    assert "Attainment by rate" in out


def test_failures_count_as_missed_and_are_shown_by_kind(
    url: str, trace: Path, server: StreamingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error = "[red]gone[/red]"
    assert bench(url, trace, "--warm-up", 0, "--json", tmp_path / "r.json") == 1
    document = json.loads((tmp_path / "r.json").read_text())
    assert (document["attainment"], document["succeeded"], document["client_late"]) == (0.0, 0, False)
    assert document["errors_by_kind"] == {"HTTP 502": 10}
    assert "10 × HTTP 502: [red]gone[/red]" in capsys.readouterr().out


def test_a_late_client_has_no_result(
    url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowprefill_sglang.bench.report.LATE_MS", -1.0)
    assert bench(url, trace, "--json", tmp_path / "r.json") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("flowprefill bench: no result: the load client fell behind in repeat 1 of 1")
    assert captured.err.count("\n") == 1
    assert "requests succeeded" not in captured.out
    document = json.loads((tmp_path / "r.json").read_text())
    assert (document["client_late"], document["attainment"], document["classes"]) == (True, None, {})
    assert len(document["records"]) == 10


def test_bad_rows(url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text(AZURE + "broken\n")
    assert bench(url, trace) == 2
    assert f"{trace}:12: expected TIMESTAMP" in capsys.readouterr().err
    assert bench(url, trace, "--skip-bad-rows", "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["workload"]["skipped_rows"] == 1
    assert "1 broken rows left out" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["random", "generated-shared-prefix"])
def test_sglangs_generated_datasets(url: str, server: StreamingServer, tmp_path: Path, dataset: str) -> None:
    small = ("--random-input-len", "90", "--requests", "6") if dataset == "random" else ()
    groups = ("--gsp-num-groups", "2", "--gsp-prompts-per-group", "3", "--gsp-system-prompt-len", "64")
    flags = ("--dataset-name", dataset, *groups, *small, *LOAD, "--json", str(tmp_path / "r.json"))
    assert main(["bench", "--url", url, *flags]) == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["requests"] == 6
    if dataset == "generated-shared-prefix":
        prefixes = {body["text"][:60] for body in server.bodies[1:]}
        assert len(prefixes) == 2


def test_a_sharegpt_file(url: str, tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    talk = {"conversations": [{"from": "human", "value": "a" * 200}, {"from": "gpt", "value": "b" * 40}]}
    path.write_text(json.dumps([talk] * 5))
    flags = ["bench", "--url", url, "--trace", str(path), "--format", "sharegpt", *LOAD, "--json", str(tmp_path / "r")]
    assert main(flags) == 0
    assert {record["input_tokens"] for record in json.loads((tmp_path / "r").read_text())["records"]} == {50}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--trace", "x"), "--trace and --format go together"),
        (("--trace", "absent", "--format", "qwen"), "the trace cannot be read"),
        (("--url", "localhost:30000"), "expected an address like http://127.0.0.1:30000"),
        (("--json", "/nowhere/out.json"), "does not exist"),
        (("--plot", "/nowhere/plots"), "cannot be made"),
        (("--prompts", "ids", "--endpoint", "chat"), "takes text only"),
        (("--dataset-name", "random"), "has no arrival times: say how many requests a second with --rate"),
        (("--dataset-name", "random", "--rate", "1", "--random-range-ratio", "3"), "expected a number from 0 to 1"),
        (("--start", "1e9"), "no request"),
        (("--requests", "1", "--max-goodput"), "no rate"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:1", *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--slo", "text"), "expected CLASS=MS, like text=250, got 'text'"),
        (("--slo", "text=-1"), "expected CLASS=MS with a number of milliseconds above 0, got '-1'"),
        (("--rates", "1,x"), "expected a number above 0, got 'x'"),
        (("--target", "1"), "expected a number above 0 and below 1, got '1'"),
        (("--warm-up", "-1"), "expected a whole number of at least 0, got -1"),
        (("--dance",), "unrecognized arguments: --dance"),
    ],
)
def test_wrong_values_say_what_was_expected(
    flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--url", "http://127.0.0.1:1", *flags])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_no_server_is_one_line_and_status_1(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:1", trace) == 1
    error = capsys.readouterr().err
    assert error.startswith("flowprefill bench: nothing from http://127.0.0.1:1/v1/models")
    assert error.count("\n") == 1


def test_compare(url: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, other = (tmp_path / name for name in ("a.json", "b.json", "other.json"))
    for path in (a, b):
        assert bench(url, trace, "--repeats", 2, "--json", path) == 0
    assert bench(url, trace, "--seed", 1, "--json", other) == 0
    capsys.readouterr()
    assert main(["bench", "compare", str(a), str(b), "--json", str(tmp_path / "c.json")]) == 0
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["compared"]["all"]["attainment"]["value"] == 0
    assert document["compared"]["text"]["ttft_p50_ms"]["min"] <= document["compared"]["text"]["ttft_p50_ms"]["max"]
    out = capsys.readouterr().out
    assert "least and most over all pairs of A's 2 and B's 2 repeats" in out
    assert main(["bench", "compare", str(a), str(other)]) == 2
    assert (
        "not the same load, so there is nothing to compare (--anyway does it): seed 0 against 1"
        in capsys.readouterr().err
    )
    assert main(["bench", "compare", str(a), str(other), "--anyway"]) == 0
    assert "NOT THE SAME LOAD: seed 0 against 1" in capsys.readouterr().out
