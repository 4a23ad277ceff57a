"""FlowPrefill on SGLang: preemptive, deadline-aware prefill serving (arXiv 2602.16603)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flowprefill-sglang")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+uninstalled"

__all__ = ["__version__"]
