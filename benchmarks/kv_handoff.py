"""KV handoff throughput: the built-in ``zmq`` transfer backend against Mooncake over TCP, on one machine in one run.

Two processes, one the prefill rank and one the decode rank, run SGLang's real manager, sender, receiver and bootstrap
classes of each backend over pools in CPU memory. Measured from the scheduler's ``send`` to decode's poller seeing
Success; the backends take turns within each repeat, in alternating order. Before each transfer decode's pages are
cleared, after it they are compared byte for byte. Each process polls every 0.2 ms, as a scheduler between batches does.

    python benchmarks/kv_handoff.py --json result.json
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from results_file import write_result

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_testing.kv_managers import RankMemory, sglang_context

MIB: Final = 1 << 20
BUFFERS: Final = 64
TOKEN_BYTES_A_BUFFER: Final = 2048
"""Together an 8B model's KV: 32 layers, 8 KV heads of 128, two bytes a value; 128 KiB a token."""
MOONCAKE_ENVIRONMENT: Final = {
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_LOG_LEVEL": "ERROR",
    # SGLang hands Mooncake one transfer a run of pages and a buffer. Mooncake fails the session when a few thousand
    # are queued, which scattered pages of 16 MiB are already (raising MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER did not
    # help), so use SGLang's own bound: at most 8 pages times 64 buffers in one call.
    "SGLANG_MOONCAKE_MAX_TRANSFER_BATCH_INDICES": "8",
}
POLL_S: Final = 0.0002
TIMEOUT_S: Final = 120.0


def main() -> int:
    """Run all configurations, print a table, write the raw rows."""
    options = parse(sys.argv[1:])
    backends = ["zmq"]
    if importlib.util.find_spec("mooncake"):
        backends.append("mooncake")
    else:
        print("mooncake cannot be imported here: only zmq is measured", file=sys.stderr)
    os.environ.update(MOONCAKE_ENVIRONMENT)
    rows = [row for page_tokens in options.page_tokens for row in measure_page_size(options, backends, page_tokens)]
    print_table(rows)
    if options.json:
        measured = {
            "measured_from_to": "sender.send() called -> decode poll() is Success, bytes compared afterwards",
            "token_bytes": BUFFERS * TOKEN_BYTES_A_BUFFER,
            "buffers": BUFFERS,
            "mooncake": MOONCAKE_ENVIRONMENT if "mooncake" in backends else "not importable",
            "rows": rows,
        }
        write_result(options.json, seed=options.seed, measured=measured)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write provenance and raw rows here")
    parser.add_argument("--sizes-mib", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--page-tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def measure_page_size(options: argparse.Namespace, backends: list[str], page_tokens: int) -> list[dict[str, Any]]:
    """All sizes and repeats for one page size; a fresh pair of processes, since SGLang's configuration is global."""
    spawn = multiprocessing.get_context("spawn")
    decode_end, prefill_end = spawn.Pipe()
    ports = dict(zip(backends, free_ports(len(backends)), strict=True))
    total_tokens = max(options.sizes_mib) * MIB // (BUFFERS * TOKEN_BYTES_A_BUFFER)
    shape = {"page_tokens": page_tokens, "pages": -(-total_tokens // page_tokens) + 1, "seed": options.seed}
    out_of, into = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=run_decode, args=(decode_end, ports, shape), daemon=True),
        spawn.Process(target=run_prefill, args=(prefill_end, into, ports, shape, vars(options)), daemon=True),
    ]
    for process in processes:
        process.start()
    for end in (decode_end, prefill_end, into):
        end.close()  # so that a child's death is the end of the pipe here
    rows: list[dict[str, Any]] = []
    try:
        while (row := out_of.recv()) is not None:
            rows.append(row)
            print(".", end="", file=sys.stderr, flush=True)
    except EOFError:
        raise SystemExit(f"page size {page_tokens}: a measuring process ended early, see above") from None
    print(file=sys.stderr)
    for process in processes:
        process.join(10)
        process.kill()
    return rows


class Rank:
    """One process's end of every backend: its memory and its managers."""

    def __init__(self, mode: str, ports: dict[str, int], shape: dict[str, int], server_args: Any) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode, KVClassType, TransferBackend, get_kv_class
        from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
        from sglang.srt.runtime_context import get_disagg
        from sglang.srt.utils.network import get_local_ip_auto

        page_bytes = TOKEN_BYTES_A_BUFFER * shape["page_tokens"]
        self.memory = RankMemory(
            page_bytes=[page_bytes] * BUFFERS,
            pages=shape["pages"],
            aux_bytes=[64] * 14,
            requests=2,
            page_tokens=shape["page_tokens"],
        )
        self.managers: dict[str, Any] = {}
        self.sides: dict[str, Any] = {}
        self.addresses = {backend: f"127.0.0.1:{port}" for backend, port in ports.items()}
        side = KVClassType.SENDER if mode == "prefill" else KVClassType.RECEIVER
        for name, port in ports.items():
            backend = TransferBackend(name)
            if name == "mooncake":
                mooncake_transfer_engine.init_mooncake_transfer_engine(get_local_ip_auto(), gpu_id=0, ib_device=None)
            if mode == "prefill":
                get_kv_class(backend, KVClassType.BOOTSTRAP_SERVER)("127.0.0.1", port)
            manager = get_kv_class(backend, KVClassType.MANAGER)
            with get_disagg().override(disaggregation_bootstrap_port=port):
                self.managers[name] = manager(self.memory.args, DisaggregationMode(mode), server_args)
            self.sides[name] = get_kv_class(backend, side)

    def fill(self, seed: int) -> None:
        """The same bytes for the same seed, in whichever process."""
        random = np.random.default_rng(seed)
        for array in (*self.memory.kv, *self.memory.aux):
            array[:] = random.integers(1, 255, array.shape, dtype=np.uint8)


def run_prefill(pipe: Connection, rows: Connection, ports: dict[str, int], shape: dict[str, int], options: Any) -> None:
    """The prefill process; it also decides what is measured."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    with sglang_context(1) as server_args:
        rank = Rank("prefill", ports, shape, server_args)
        rank.fill(shape["seed"])
        pipe.recv()  # decode is up
        room = 0
        for repeat in range(-1, options["repeats"]):  # -1 warms up: connections, first touch of memory
            order = list(ports) if repeat % 2 else list(ports)[::-1]
            for size_mib in options["sizes_mib"]:
                pages = -(-size_mib * MIB // (BUFFERS * TOKEN_BYTES_A_BUFFER * shape["page_tokens"]))
                for placement in ("contiguous", "scattered"):
                    for name in order:
                        room += 1
                        source = place(pages, shape, placement, options["seed"] + room)
                        sender = rank.sides[name](rank.managers[name], rank.addresses[name], room)
                        sender.init(pages, 0)
                        pipe.send((name, room, source.tolist(), place(pages, shape, placement, options["seed"] - room)))
                        wait(lambda s=sender: s.poll() == KVPoll.WaitingForInput)
                        started_at = time.monotonic()
                        sender.send(source, [])
                        wait(lambda s=sender: s.poll() in (KVPoll.Success, KVPoll.Failed))
                        if sender.poll() == KVPoll.Failed:
                            sender.failure_exception()
                        sender.clear()
                        done_at, wrong_pages = pipe.recv()
                        if wrong_pages:
                            raise SystemExit(f"{name}: {wrong_pages} of {pages} pages differ")
                        if repeat >= 0:
                            rows.send(
                                {
                                    "backend": name,
                                    "page_tokens": shape["page_tokens"],
                                    "placement": placement,
                                    "bytes": pages * sum(rank.memory.page_bytes),
                                    "repeat": repeat,
                                    "seconds": done_at - started_at,
                                    "bytes_verified": True,
                                }
                            )
        pipe.send(None)
        rows.send(None)
    os._exit(0)  # Mooncake's and SGLang's threads have no end of their own


def run_decode(pipe: Connection, ports: dict[str, int], shape: dict[str, int]) -> None:
    """The decode process."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    with sglang_context(1) as server_args:
        rank = Rank("decode", ports, shape, server_args)
        rank.fill(shape["seed"])
        expected = [array.copy() for array in rank.memory.kv]
        pipe.send("up")
        while (order := pipe.recv()) is not None:
            name, room, source, target = order
            for array in rank.memory.kv:
                array[target] = 0
            receiver = rank.sides[name](rank.managers[name], rank.addresses[name], room)
            wait(lambda n=name: rank.managers[n].try_ensure_parallel_info(rank.addresses[n]))
            receiver.init(0)
            receiver.send_metadata(target, 1, [])
            wait(lambda r=receiver: r.poll() in (KVPoll.Success, KVPoll.Failed))
            if receiver.poll() == KVPoll.Failed:
                receiver.failure_exception()
            done_at = time.monotonic()
            receiver.clear()
            wrong = np.zeros(len(source), dtype=bool)
            for array, original in zip(rank.memory.kv, expected, strict=True):
                wrong |= (array[target] != original[source]).any(axis=1)
            pipe.send((done_at, int(wrong.sum())))
    os._exit(0)


def place(pages: int, shape: dict[str, int], placement: str, seed: int) -> npt.NDArray[np.int32]:
    """Page numbers as a fresh pool hands them out, or as a worn one does. Page 0 is SGLang's padding."""
    if placement == "contiguous":
        return np.arange(1, pages + 1, dtype=np.int32)
    order = np.random.default_rng(abs(seed)).permutation(shape["pages"] - 1)[:pages]
    return (order + 1).astype(np.int32)


def wait(condition: Callable[[], bool]) -> None:
    """Poll as a scheduler does; end the run when nothing comes of it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {TIMEOUT_S} s")
        time.sleep(POLL_S)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Median and range of MB/s a configuration, and the ratio of the medians."""
    groups: dict[tuple[int, str, int], dict[str, list[float]]] = {}
    for row in rows:
        key = (row["page_tokens"], row["placement"], row["bytes"])
        rate = row["bytes"] / row["seconds"] / 1e6
        groups.setdefault(key, {}).setdefault(row["backend"], []).append(rate)
    print(f"{'page':>4} {'placement':<10} {'MiB':>6}  {'zmq MB/s':>24}  {'mooncake TCP MB/s':>24}  ratio")
    for (page_tokens, placement, size), rates in groups.items():
        cells = [
            f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})" if (r := rates.get(name)) else "-"
            for name in ("zmq", "mooncake")
        ]
        ratio = (
            f"{statistics.median(rates['zmq']) / statistics.median(rates['mooncake']):.2f}" if len(rates) > 1 else "-"
        )
        print(f"{page_tokens:>4} {placement:<10} {size / MIB:>6.0f}  {cells[0]:>24}  {cells[1]:>24}  {ratio}")


if __name__ == "__main__":
    raise SystemExit(main())
