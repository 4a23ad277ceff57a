"""A prefill worker that does not sleep when idle, as SGLang by itself: ``flowprefill prefill``, without the CPU
platform's ``sleep_on_idle``. For ``idle_cpu.py``.
"""

from __future__ import annotations

import sys
from typing import Any

from flowprefill_sglang.cli.main import main


def leave_sleeping_alone() -> None:
    """Take back the one setting of the platform's."""
    import sglang  # noqa: F401  # loads the platform; the other way round is an import cycle of SGLang's

    from flowprefill_sglang.integration.cpu_platform import TorchCpuPlatform

    set_defaults = TorchCpuPlatform.apply_server_args_defaults

    def apply_server_args_defaults(platform: TorchCpuPlatform, server_args: Any) -> None:  # SGLang's settings
        set_defaults(platform, server_args)
        server_args.sleep_on_idle = False

    setattr(TorchCpuPlatform, "apply_server_args_defaults", apply_server_args_defaults)  # noqa: B010  # for mypy


if __name__ == "__main__":  # SGLang's other processes get their settings from this one
    leave_sleeping_alone()
    sys.exit(main())
