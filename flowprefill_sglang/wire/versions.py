"""Which version of a protocol two sides speak, that were installed at different times. Pure.

Each side states the versions it speaks, from its oldest to its newest; the one that answers takes the newest that both
know, or says in one sentence which side is too old. What is exchanged until then (``Hello``, ``Welcome`` and
``Refused``; ``Register`` and ``Hello`` of the KV handoff) belongs to no version: its fields are only ever added to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Versions:
    """The versions of one protocol that one side speaks, both ends included."""

    oldest: int
    newest: int

    def __contains__(self, version: int) -> bool:
        return self.oldest <= version <= self.newest

    def __str__(self) -> str:
        return f"version {self.newest}" if self.oldest == self.newest else f"versions {self.oldest} to {self.newest}"


def stated(newest: int, oldest: int | None) -> Versions:
    """What a peer said of itself; peers from before ranges existed state one version."""
    return Versions(newest if oldest is None else oldest, newest)


def newest_common(one: Versions, other: Versions) -> int | None:
    """The newest version that both speak; None when there is none, as with a range that is upside down."""
    newest = min(one.newest, other.newest)
    return newest if newest in one and newest in other else None


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a refusal, for the person who reads it."""

    what: str
    """Its role, and its name where it has one: ``router``, ``worker prefill-0``."""
    software: str
    """Version of FlowPrefill; empty when the peer did not say."""
    versions: Versions

    def __str__(self) -> str:
        return f"{self.what} (FlowPrefill {self.software})" if self.software else self.what


def why_not(protocol: str, one: Side, other: Side) -> str:
    """Why two sides without a common version cannot work together, and which one to upgrade."""
    older = one if one.versions.newest < other.versions.newest else other
    return (
        f"no common version of the {protocol} protocol: {one} speaks {one.versions}, "
        f"{other} speaks {other.versions}; upgrade {older.what}"
    )
