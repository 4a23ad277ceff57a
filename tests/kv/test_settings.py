"""The backend's settings."""

from __future__ import annotations

import pytest

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.kv.settings import KvSettings, settings_from_environment


def test_defaults_without_variables() -> None:
    assert settings_from_environment({"HOME": "/root"}) == KvSettings()


def test_values_take_the_type_of_their_field() -> None:
    settings = settings_from_environment({"FLOWPREFILL_KV_CHUNK_BYTES": "65536", "FLOWPREFILL_KV_STALL_TIMEOUT_S": "2"})
    assert settings == KvSettings(chunk_bytes=65536, stall_timeout_s=2.0)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("FLOWPREFILL_KV_CHUNK_BYTES", "4M", "positive integer"),
        ("FLOWPREFILL_KV_WINDOW_CHUNKS", "0", "positive integer"),
        ("FLOWPREFILL_KV_STALL_TIMEOUT_S", "nan", "positive number"),
        ("FLOWPREFILL_KV_STALL_TIMEOUT_S", "inf", "positive number"),
        ("FLOWPREFILL_KV_CHUNK", "4", "there are FLOWPREFILL_KV_CHUNK_BYTES"),
    ],
)
def test_a_bad_value_stops_the_start(name: str, text: str, expected: str) -> None:
    with pytest.raises(StartupError, match=expected):
        settings_from_environment({name: text})
