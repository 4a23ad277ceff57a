"""``flowprefill config check`` and ``config show``: the YAML file of a cluster."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from flowprefill_sglang.cluster.configuration_example import example_file
from flowprefill_sglang.cluster.configuration_file import Configured, read_configuration


def add_config_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``config check``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the YAML file")


def run_config_check(namespace: argparse.Namespace) -> int:
    """Print what the file would start; starts nothing, and looks at nothing but the file. Raises BadInput."""
    configured = read_configuration(namespace.file)
    rows = [("", "count", "what"), *_rows(configured)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, count, what in rows:
        print(f"{name:<{widths[0]}}  {count:>{widths[1]}}  {what}".rstrip())
    print(f"{namespace.file} is right")
    return 0


def _rows(one: Configured) -> list[tuple[str, str, str]]:
    router = [f"http://{one.host}:{one.port}", "with a key" if one.api_key else "without a key"]
    launcher = one.launcher + (f", joins {one.ray_address}" if one.ray_address else "")
    launcher += ", GPUs shared" if one.share_gpus else ""
    prefill = ("--prefill-scheduler", one.prefill_scheduler, *one.prefill_arguments)
    return [
        ("model", "", str(one.model_path or "a tiny random-weight one, made at the start")),
        ("router", "1", ", ".join(router) + _flags(one.router_arguments)),
        ("prefill", str(one.prefill), f"workers{_flags(prefill)}"),
        ("decode", str(one.decode), f"instances{_flags(one.decode_arguments)}"),
        ("servers", str(one.prefill + one.decode), f"SGLang{_flags(one.sglang_arguments)}"),
        ("launcher", "", f"{launcher}, ready within {one.startup_timeout_s:g} s"),
        ("logs", "", str(one.log_dir or "a temporary folder")),
    ]


def _flags(flags: tuple[str, ...]) -> str:
    return ": " + shlex.join(flags) if flags else ""


def add_config_show_arguments(parser: argparse.ArgumentParser) -> None:
    """``config show`` has no flags."""


def run_config_show(namespace: argparse.Namespace) -> int:
    """Print a file with every field at its default."""
    print(example_file(), end="")
    return 0
