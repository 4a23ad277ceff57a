"""What of PyTorch, SGLang and its kernels loads here, and which parts can therefore run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "sgl_kernel", "flashinfer", "sglang", "greenlet", "msgspec", "zmq", "matplotlib")


def main() -> int:
    """0 always: what is missing is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options, _ = parser.parse_known_args()
    packages = {name: tried(name) for name in PACKAGES}
    plugin = plugin_fault() if packages["sglang"]["loads"] else "SGLang does not load"
    faults = engine_faults(options.device, packages, plugin)
    torch_alone = [] if packages["torch"]["loads"] else ["PyTorch does not load"]
    if options.device == "cuda" and not torch_alone and not device_facts("cuda"):
        torch_alone = ["PyTorch finds no CUDA device"]
    flashinfer = [] if packages["flashinfer"]["loads"] else ["flashinfer does not load"]
    needs_flashinfer = flashinfer if options.device == "cuda" else ["flashinfer runs on GPUs only"]
    parts = {
        "correctness-triton": faults,
        "correctness-flashinfer": faults + needs_flashinfer,
        "blocking": faults,
        "throughput": faults,
        "kernels": torch_alone,
        "goodput": faults,
    }
    facts = device_facts(options.device) if packages["torch"]["loads"] else {}
    document = {"device": options.device, "packages": packages, "hardware": facts, "cannot_run": parts}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    for name, found in packages.items():
        print(f"{name:12} {found['version'] or '-':16} {'loads' if found['loads'] else found['error']}")
    return 0


def tried(name: str) -> dict[str, Any]:
    """Whether a package can be imported. A native library can fail in any way."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return {"loads": False, "version": None, "error": f"{type(error).__name__}: {error}"[:300]}
    version = getattr(module, "__version__", None)
    return {"loads": True, "version": version if isinstance(version, str) else None, "error": None}


def plugin_fault() -> str | None:
    """Why SGLang would not load our plugin."""
    entry_points = importlib.metadata.entry_points(group="sglang.srt.plugins")
    return None if any(point.name == "flowprefill" for point in entry_points) else "the plugin's entry point is missing"


def engine_faults(device: str, packages: dict[str, Any], plugin: str | None) -> list[str]:
    """Why no part with an engine can run."""
    faults = [
        f"{name} does not load" for name in ("torch", "sglang", "greenlet", "msgspec") if not packages[name]["loads"]
    ]
    if plugin is not None and not faults:
        faults.append(plugin)
    if device == "cuda":
        faults += [f"{name} does not load" for name in ("sgl_kernel", "triton") if not packages[name]["loads"]]
        if packages["torch"]["loads"] and not device_facts("cuda"):
            faults.append("PyTorch finds no CUDA device")
    return faults


def device_facts(device: str) -> dict[str, Any]:
    """The GPU, as PyTorch sees it; empty where there is none."""
    import torch

    if device == "cpu":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
