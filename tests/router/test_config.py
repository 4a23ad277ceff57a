"""Flags and configuration are one thing."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.config import RouterConfig, add_arguments, from_arguments
from flowprefill_sglang.router.objectives import DEFAULT_CLASSES_MS


def parsed(*flags: str) -> RouterConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(flags))


def test_no_flags_are_the_defaults() -> None:
    assert parsed() == RouterConfig()


def test_every_field_has_a_flag_and_a_help_text() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for field in dataclasses.fields(RouterConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"]


def test_flags() -> None:
    config = parsed(
        *("--port", "8080", "--decode", "http://a:1/", "--decode", "https://b:2", "--policy", "round_robin"),
        *("--queue-timeout-secs", "1.5", "--disable-retries", "--api-key", "k"),
    )
    assert config.decode == ("http://a:1", "https://b:2")
    assert (config.prefill_policy, config.decode_policy) == ("round_robin", "round_robin")
    assert (config.port, config.queue_timeout_secs, config.retries, config.api_key) == (8080, 1.5, 0, "k")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrent_requests": 0},
        {"port": -1},
        {"decode": ("localhost:30000",)},
        {"decode": ("http://x:99999",)},
        {"prefill_policy": "none"},
        {"heartbeat_dead_secs": 0.5},
        {"queue_size": -1},
        {"prometheus_port": -1},
        {"default_slo_class": "chat"},
        {"default_slo_class": "custom"},
        *({"slo_class": (text,)} for text in ("chat", "chat=", "=5", "chat=soon", "chat=0", "chat=nan", "chat=inf")),
        *({"slo_class": (text,)} for text in ("chat=0.5", "chat=3600001", "a b=5", "x" * 65 + "=5", "-a=5")),
        *({"slo_class": (f"{text}=5",)} for text in ("auto", "default", "custom")),
    ],
)
def test_values_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        RouterConfig(**wrong)


def test_classes() -> None:
    assert parsed().slo_classes_ms == DEFAULT_CLASSES_MS
    config = parsed("--slo-class", "chat=300", "--slo-class", "text=100.5", "--default-slo-class", "chat")
    assert config.slo_classes_ms == {**DEFAULT_CLASSES_MS, "chat": 300.0, "text": 100.5}
    assert config.default_slo_class == "chat"


def test_the_port_for_metrics_is_a_number_or_absent() -> None:
    assert parsed().prometheus_port is None
    assert parsed("--prometheus-port", "29000").prometheus_port == 29000
    assert parsed("--prometheus-port", "0").prometheus_port == 0
