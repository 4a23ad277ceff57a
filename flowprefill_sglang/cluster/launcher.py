"""What a launcher is asked for, on this machine or on Ray, and what it reports on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What to start."""

    model_path: Path
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    """Address of the router's HTTP port."""
    port: int = 0
    """The router's HTTP port; 0 takes a free one."""
    router_arguments: tuple[str, ...] = ()
    api_key: str | None = None
    """The bearer token that clients must send, and the servers ask each other for."""
    sglang_arguments: tuple[str, ...] = ()
    """SGLang flags for every server."""
    prefill_arguments: tuple[str, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    log_dir: Path | None = None
    """Where the children's logs go; default: a temporary folder, removed after a clean end."""
    threads: int | None = None
    """CPU threads of each SGLang server's scheduler; default: on this machine the cores divided among the servers, on
    Ray 1. Ignored by GPUs."""
    share_gpus: bool = False
    """On this machine every member sees all GPUs, instead of having some for itself."""
    startup_timeout_s: float = 600.0
    """Large models load for minutes."""


@dataclass(frozen=True)
class LaunchEvent:
    """A step of one child on its way up."""

    name: str
    state: str
    elapsed_s: float
    detail: str = ""
    is_step: bool = True
    """False: ``detail`` says what it is doing, in the state that it is in."""
