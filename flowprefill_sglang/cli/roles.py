"""``flowprefill router``, ``prefill``, ``decode`` and ``version``: one process of a cluster each."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

from flowprefill_sglang import __version__
from flowprefill_sglang.prefill_worker import config as worker_config
from flowprefill_sglang.wire.messages import SPOKEN


def add_router_arguments(parser: argparse.ArgumentParser) -> None:
    """The router's flags."""
    from flowprefill_sglang.router import config

    config.add_arguments(parser)


def run_router(namespace: argparse.Namespace) -> int:
    """Run a router until it is told to stop."""
    from flowprefill_sglang.router import config, server

    return server.run(config.from_arguments(namespace))


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """The prefill worker's own flags."""
    worker_config.add_arguments(parser)


def run_prefill(namespace: argparse.Namespace) -> int:
    """Run a prefill worker until it is told to stop."""
    from flowprefill_sglang.integration.serve import serve_prefill

    return serve_prefill(worker_config.from_arguments(namespace), namespace.rest)


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """A decode instance has no flags but SGLang's."""


def run_decode(namespace: argparse.Namespace) -> int:
    """Run stock SGLang in decode mode until it is told to stop."""
    from flowprefill_sglang.integration.serve import serve_decode

    return serve_decode(namespace.rest)


def add_version_arguments(parser: argparse.ArgumentParser) -> None:
    """``version`` has no flags."""


def run_version(namespace: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    from flowprefill_sglang.kv import messages as kv_messages

    print(f"flowprefill-sglang {__version__} (wire protocol {SPOKEN}, KV handoff {kv_messages.SPOKEN})")
    for name in ("sglang", "torch", "pyzmq", "msgspec", "mooncake-transfer-engine-non-cuda"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} not installed")
    print(f"python {platform.python_version()} on {platform.platform()}")
    return 0
