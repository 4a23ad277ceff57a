"""The cluster's YAML file: what is taken from it, and one line that says what is wrong with it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.cluster.configuration_example import example_file, written
from flowprefill_sglang.cluster.configuration_fields import SECTION_TEXTS, SECTIONS, SET_BY_THE_LAUNCHER, Field
from flowprefill_sglang.cluster.configuration_file import Configured, read_configuration
from flowprefill_sglang.cluster.configuration_reasons import ROUTER_REASONS
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.prefill_worker import config as worker_config
from flowprefill_sglang.router import config as router_config

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "configuration.md"
ALL_FIELDS = [(section, field) for section, fields in SECTIONS.items() for field in fields]


def read(tmp_path: Path, text: str) -> Configured:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return read_configuration(file)


def test_a_file_of_nothing_is_all_defaults(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "router:\n", "router:\n  slo_classes:\nprefill:\n  sglang:\n", example_file()):
        one = read(tmp_path, text)
        assert (one.prefill, one.decode, one.model_path, one.log_dir) == (1, 1, None, None)
        assert (one.host, one.port, one.api_key) == ("127.0.0.1", 30000, None)
        assert one.startup_timeout_s == ClusterSpec.startup_timeout_s
        assert (one.router_arguments, one.prefill_arguments, one.decode_arguments) == ((), (), ())
        assert (one.sglang_arguments, one.threads) == ((), None)


def test_fields_become_what_up_starts(tmp_path: Path) -> None:
    one = read(
        tmp_path,
        """
model: {path: models/llama}
router:
  host: 0.0.0.0
  port: 8000
  api_key: secret
  queue_size: 64
  queue_timeout_secs: 5
  disable_retries: true
  slo_classes: {chat: 300, batch: 60000.5}
  default_slo_class: chat
prefill:
  count: 4
  scheduler: stock
  scheduler_policy: sedf
  cost_file: /costs.json
  sglang: {chunked-prefill-size: 8192, trust_remote_code: true, lora-paths: [a=/a, b=/b], json-args: {x: [1]}}
decode:
  count: 2
  sglang: {mem-fraction-static: 0.5}
servers: {threads: 3, sglang: {tp-size: 2}}
launcher: {kind: ray, ray_address: auto, device: cpu, startup_timeout_secs: 60}
logs: {dir: /var/log/f}
""",
    )
    classes = ("--slo-class", "chat=300", "--slo-class", "batch=60000.5")
    assert one == Configured(
        model_path=tmp_path / "models/llama",
        prefill=4,
        decode=2,
        host="0.0.0.0",
        port=8000,
        api_key="secret",
        prefill_scheduler="stock",
        log_dir=Path("/var/log/f"),
        launcher="ray",
        ray_address="auto",
        share_gpus=False,
        threads=3,
        startup_timeout_s=60.0,
        router_arguments=(
            *("--default-slo-class", "chat", "--queue-size", "64", "--queue-timeout-secs", "5.0", "--disable-retries"),
            *classes,
        ),
        prefill_arguments=(
            *("--scheduler-policy", "sedf", "--cost-file", "/costs.json", "--chunked-prefill-size", "8192"),
            *("--trust-remote-code", "--lora-paths", "a=/a", "b=/b", "--json-args", '{"x": [1]}'),
        ),
        decode_arguments=("--mem-fraction-static", "0.5"),
        sglang_arguments=("--device", "cpu", "--tp-size", "2"),
    )
    parser = argparse.ArgumentParser()
    router_config.add_arguments(parser)
    config = router_config.from_arguments(parser.parse_args(one.router_arguments))
    assert (config.queue_size, config.disable_retries, config.slo_classes_ms["batch"]) == (64, True, 60000.5)


WRONG = [
    ("router:\n  prot: 3\n", "2: router.prot: no such field; did you mean port?"),
    ("rooter:\n  port: 3\n", "1: rooter: no such section; did you mean router?"),
    ("port: 3\n", "1: port: no such section; did you mean router.port?"),
    ("model_path: /x\n", "1: model_path: no such section; did you mean model.path?"),
    ("prefill:\n  policy: sedf\n", "2: prefill.policy: no such field; did you mean scheduler_policy?"),
    ("prefill:\n  tp-size: 2\n", "2: prefill.tp-size: no such field; there are count, .*go below sglang"),
    ("router:\n  port: abc\n", "2: router.port: expected a whole number from 0 to 65535, not abc"),
    ("router:\n  port: 70000\n", "2: router.port: expected a whole number from 0 to 65535, not 70000"),
    ("router:\n  port: '30000'\n", "2: router.port: expected .* .in digits, without quotes or exponent., not '30000'"),
    ("router:\n  port: 2024-01-05\n", "2: router.port: expected .*, not 2024-01-05"),
    ("router:\n  queue_timeout_secs: 1e3\n", "2: router.queue_timeout_secs: .*without quotes or exponent.*not 1e3"),
    ("router:\n  queue_timeout_secs: .inf\n", "2: router.queue_timeout_secs: expected a number of seconds.*not .inf"),
    ("router:\n  queue_size: -1\n", "2: router.queue_size: expected a whole number of at least 0, not -1"),
    ("router:\n  disable_retries: 'yes'\n", "2: router.disable_retries: expected true or false, not 'yes'"),
    ("router:\n  prefill_policy: fastest\n", "2: .*expected one of least_work, round_robin, not fastest"),
    ("router:\n  host:\n", "2: router.host: expected text, not nothing"),
    ("router:\n  api_key: 1234\n", "2: router.api_key: expected text, or null; quote a key of digits alone$"),
    ("router: 5\n", "1: router: expected a mapping with any of host, port, .*, not 5"),
    ("[1, 2]\n", " expected sections .model, router, .*, not a list"),
    ("router:\n  port: 1\n  host: x\n  port: 2\n", "4: router.port comes twice, first in line 2"),
    ("router:\n  port: 1\nrouter: {}\n", "3: router comes twice, first in line 1"),
    ("router:\n\tport: 1\n", "2: this is no YAML: .*cannot start any token"),
    ("router: {port: 1\n", "2: this is no YAML: .*expected ',' or '}'"),
    ("a: 1\n---\nb: 2\n", "2: this is no YAML: expected a single document"),
    ('"a\\nb": 1\n', "1: 'a.nb': no such section"),
    ('router: {host: "\\ud800"}\n', "1: .*is no text"),
    ("router:\n  on: 3\n", "2: expected a name in router, not on .quote it"),
    ("router:\n  <<: {port: 3}\n", "2: merge keys"),
    ("router: &a\n  host: *a\n", "2: router.host: an alias"),
    ("router:\n  port: 2024-13-45\n", " this is no YAML: month must be"),
    ("\0", " this is no YAML: unacceptable character"),
    ("[" * 20_000, " values are nested too deeply"),
    (
        "router:\n  slo_classes: {chat: fast}\n",
        "2: router.slo_classes.chat: expected a name.*to 3600000, not fast",
    ),
    ("router:\n  slo_classes: {chat: 0}\n", "2: router.slo_classes.chat: expected .*, not 0"),
    ("router:\n  slo_classes: {chat: true}\n", "2: router.slo_classes.chat: expected .*, not true"),
    ("router:\n  slo_classes: {a b: 30}\n", "2: router.slo_classes.a b: expected a name of letters"),
    ("router:\n  slo_classes: {auto: 30}\n", "2: router.slo_classes.auto: the name auto has a meaning of its own"),
    ("router:\n  slo_classes: [chat=3]\n", "2: router.slo_classes: expected a mapping of class names.*, not a list"),
    ("router:\n  default_slo_class: x\n", "2: router.default_slo_class: must be one of text, .*, not 'x'"),
    ("router:\n  heartbeat_dead_secs: 0.5\n", "2: .*must be longer than router.heartbeat_interval_secs"),
    ("prefill:\n  count: 0\n", "2: prefill.count: expected a whole number of at least 1, not 0"),
    ("prefill:\n  max_wait_secs: 0\n", "2: prefill.max_wait_secs: expected a number of seconds above 0, not 0"),
    ("prefill:\n  sglang: --tp-size 2\n", "2: prefill.sglang: expected a mapping of SGLang's flags.*not --tp-size 2"),
    ("prefill:\n  sglang: {--tp-size: 2}\n", "2: prefill.sglang.--tp-size: .*without dashes in front, as in tp-size"),
    ("prefill:\n  sglang: {host: x}\n", "2: prefill.sglang.host: use the field router.host instead"),
    ("decode:\n  sglang: {cost-file: x}\n", "2: .*use the field prefill.cost_file instead"),
    ("prefill:\n  sglang: {router: x}\n", "2: .*the launcher sets --router itself"),
    ("prefill:\n  sglang: {dtype: }\n", "2: prefill.sglang.dtype: expected text.*, not nothing"),
    ("prefill:\n  sglang: {flag: false}\n", "2: .*leave it out, not false"),
    ("launcher:\n  kind: docker\n", "2: launcher.kind: expected one of local, ray, not docker"),
    ("launcher:\n  ray_address: auto\n", "2: launcher.ray_address: expected null, since launcher.kind is not ray"),
]


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=[text[:40] for text, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(BadInput, match=f"^{tmp_path}/c.yaml:{expected}") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary", tmp_path / "large"
    binary.write_bytes(b"router:\xff\n")
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    for file, expected in (
        (tmp_path / "none.yaml", "cannot read .*none.yaml: No such file"),
        (tmp_path, "cannot read .*: Is a directory"),
        (binary, "no text in UTF-8"),
        (large, "that is no configuration"),
    ):
        with pytest.raises(BadInput, match=expected):
            read_configuration(file)


def test_a_small_file_cannot_stand_for_a_huge_one(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(BadInput, match="for too much"):
        read(tmp_path, "\n".join(lines))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    section, field = data.draw(st.sampled_from(ALL_FIELDS))
    text = json.dumps({section: {field.name: data.draw(VALUES)}})
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    try:
        found = str(read_configuration(file).port)
    except BadInput as error:
        found = str(error)
    assert found.isdecimal() or (found.startswith(f"{file}:") and "\n" not in found)


# ---- the table of fields, and what is made from it ------------------------------------------------------------------


@pytest.mark.parametrize(("section", "field"), ALL_FIELDS, ids=[f"{section}.{f.name}" for section, f in ALL_FIELDS])
def test_every_field_says_why_and_is_shown_and_documented(section: str, field: Field) -> None:
    assert field.text
    assert field.why
    assert f"\n  {field.name}: {written(field.default)}\n" in example_file()
    row = f"| `{field.name}` | {field.kind.expected} | `{written(field.default)}` |"
    assert row in DOCUMENT.read_text().partition(f"## `{section}`")[2].partition("\n## ")[0], row


def test_every_section_is_documented() -> None:
    assert list(SECTIONS) == list(SECTION_TEXTS)


def test_the_router_s_fields_are_the_router_s_own() -> None:
    assert {field.name: field.default for field in SECTIONS["router"] if field.flag is not None} == {
        item.name: item.default
        for item in dataclasses.fields(router_config.RouterConfig)
        if item.name not in SET_BY_THE_LAUNCHER
    }
    assert set(ROUTER_REASONS) == {field.name for field in SECTIONS["router"]} - {"slo_classes"}


def test_every_flag_of_a_prefill_worker_is_a_field_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    worker_config.add_arguments(parser)
    defaults = vars(parser.parse_args(["--router", "tcp://h:1"]))
    fields = {field.name: field.default for field in SECTIONS["prefill"]}
    del defaults["router"], defaults["name"]  # the launcher's
    assert fields["scheduler"] == defaults.pop("prefill_scheduler")
    assert {name: fields[name] for name in defaults} == defaults
    assert set(fields) == {*defaults, "scheduler", "count", "sglang"}
