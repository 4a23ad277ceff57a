"""A prefill side and a decode side of the KV handoff, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowprefill_testing.kv_link_pair import (
    Decode,
    Prefill,
)


@pytest.fixture
def decode() -> Iterator[Decode]:
    side = Decode()
    yield side
    side.links.shut_down()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    side = Prefill()
    yield side
    side.links.close()
