"""Time of each kernel over its floor: bytes over measured bandwidth, or operations over measured matrix rate.

What ``flowprefill_sglang.kernels`` has is found at run time: a case whose function is not there is said to be missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowprefill_sglang.bench.report import percentile

ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one shape."""

    name: str
    shape: str
    run: Callable[[], object]
    moved_bytes: int = 0
    operations: int = 0


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options, _ = parser.parse_known_args()
    device, is_cuda = torch.device(options.device), options.device == "cuda"
    bandwidth, rate = measured_bandwidth(device, is_cuda), measured_matrix_rate(device, is_cuda)
    rows, missing = [], []
    for name, maker in CASES.items():
        module_name, _, function = name.rpartition(".")
        try:
            module = importlib.import_module(f"flowprefill_sglang.kernels.{module_name}")
        except ImportError as error:
            missing.append({"kernel": name, "why": str(error)})
            continue
        if not hasattr(module, function):
            missing.append({"kernel": name, "why": "not there"})
            continue
        for case in maker(module, device, is_cuda):
            times_s = timed(case.run, is_cuda)
            floor_s = max(case.moved_bytes / bandwidth, case.operations / rate)
            p50_s = percentile(times_s, 50)
            row = {
                "kernel": case.name,
                "shape": case.shape,
                "p50_us": round(1e6 * p50_s, 3),
                "floor_us": round(1e6 * floor_s, 3),
                "over_floor": round(p50_s / floor_s, 3),
            }
            rows.append(row)
            print(row)
    document = {
        "device": options.device,
        "measured": {"bandwidth_bytes_per_s": bandwidth, "matrix_operations_per_s": rate},
        "missing": missing,
        "rows": rows,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def timed(run: Callable[[], object], is_cuda: bool) -> list[float]:
    """Seconds of each of some calls, by the device's clock on a GPU."""
    for _ in range(3):  # compiles, fills caches
        run()
    if not is_cuda:
        times_s = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - began)
        return times_s
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1_000 for begin, end in events]


def measured_bandwidth(device: torch.device, is_cuda: bool) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    size = 2**30 if is_cuda else 2**25
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timed(lambda: target.copy_(source), is_cuda))


def measured_matrix_rate(device: torch.device, is_cuda: bool) -> float:
    """Operations a second of a large matrix product."""
    n, dtype = (8_192, torch.bfloat16) if is_cuda else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, is_cuda))


def kv_rows(module: Any, device: torch.device, is_cuda: bool) -> Iterator[Case]:
    """KV pages on the device, gathered and scattered."""
    pages = 65_536 if is_cuda else 2_048
    for page_bytes in (2_048, 32_768):
        pool = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device=device)
        rows = torch.randperm(pages, device=device)[: pages // 2]
        block = module.gather_rows(pool, rows)
        moved = 2 * block.numel()
        shape = f"{len(rows)} pages of {page_bytes} bytes"
        yield Case(
            name="gather_rows", shape=shape, run=lambda p=pool, r=rows: module.gather_rows(p, r), moved_bytes=moved
        )
        yield Case(
            name="scatter_rows",
            shape=shape,
            run=lambda p=pool, r=rows, b=block: module.scatter_rows(p, r, b),
            moved_bytes=moved,
        )


def kv_pages(module: Any, device: torch.device, is_cuda: bool) -> Iterator[Case]:
    """KV pages to host memory: on a GPU the bus is the floor, which is not measured, and device memory stands in."""
    pages, page_bytes = 2_048, 2_048
    pool = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device=device)
    ids = torch.randperm(pages)[: pages // 2].numpy()
    block = torch.empty(module.block_bytes([pool], len(ids)), dtype=torch.uint8)
    yield Case(
        name="gather_pages",
        shape=f"{len(ids)} pages of {page_bytes} bytes to the host",
        run=lambda: module.gather_pages([pool], ids, block),
        moved_bytes=2 * block.numel(),
    )


def merges(module: Any, device: torch.device, is_cuda: bool) -> Iterator[Case]:
    """Two attention states into one."""
    rows, heads, width = (8_192, 32, 128) if is_cuda else (256, 4, 64)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    states = [
        (torch.randn(rows, heads, width, device=device, dtype=dtype), torch.randn(rows, heads, device=device))
        for _ in range(2)
    ]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in states[0])
    yield Case(
        name="merge_states",
        shape=f"{rows} rows, {heads} heads of {width}, {dtype}",
        run=lambda: module.merge_states(*states),
        moved_bytes=3 * state_bytes,
    )


def row_attention(module: Any, device: torch.device, is_cuda: bool) -> Iterator[Case]:
    """The last query rows of a causal prompt against all of its keys."""
    keys, rows, heads, kv_heads, width = (16_384, 1_024, 32, 8, 128) if is_cuda else (512, 128, 4, 2, 64)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    q = torch.randn(rows, heads, width, device=device, dtype=dtype)
    k, v = (torch.randn(keys, kv_heads, width, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(q)
    pairs = rows * (keys - rows) + rows * (rows + 1) // 2
    yield Case(
        name="attend_rows",
        shape=f"{rows} rows, {keys} keys, {heads}/{kv_heads} heads of {width}, {dtype}",
        run=lambda: module.attend_rows(q, k, v, out, scale=width**-0.5, first_key=keys - rows),
        operations=4 * pairs * heads * width,
        moved_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (q, k, v)),
    )


CASES: dict[str, Callable[[Any, torch.device, bool], Iterator[Case]]] = {
    "kv_pages.gather_pages": kv_pages,
    "kv_pages.gather_rows": kv_rows,
    "attention_state.merge_states": merges,
    "attention_state.attend_rows": row_attention,
}
"""By the function's name below ``flowprefill_sglang.kernels``."""

if __name__ == "__main__":
    sys.exit(main())
