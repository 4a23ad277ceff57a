"""Flags and configuration are one thing."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.config import RouterConfig, add_arguments, from_arguments


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
    ],
)
def test_values_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        RouterConfig(**wrong)
