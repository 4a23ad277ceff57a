"""Runs random schedules of interrupted prefills on many models, one process each, and reports as JSON.

SGLang takes ten seconds to import and holds one model per process, so this program imports it once and forks for each
model: ``python -m flowprefill_testing.exactness DIRECTORY MODEL:BACKEND:SCHEDULES …`` writes ``MODEL-BACKEND.json`` for
each. ``:broken`` after that leaves out one saved thing after the other too. ``:lora`` gives prompts LoRA adapters in
turn and writes ``MODEL-BACKEND-lora.json``. It starts no thread before it forks.
"""

# ruff: noqa: E402  what must be set before the imports is set before the imports
from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sglang.srt.plugins import load_plugins

load_plugins()

import sglang.srt.managers.scheduler  # noqa: F401
import torch
from sglang.srt.lora.lora_registry import LoRARef
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.preemption import sliced_operators
from flowprefill_sglang.integration.preemption.activation_bound import activation_bound
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles
from flowprefill_sglang.integration.preemption.operator_boundaries import install_cuts
from flowprefill_sglang.integration.preemption.operator_work import Kind, work_of
from flowprefill_sglang.integration.preemption.self_test import interruption_fault
from flowprefill_sglang.integration.preemption.slicing import slicing_fault
from flowprefill_sglang.prefill_worker.task import ForwardTask
from flowprefill_testing.adapters import make_adapter
from flowprefill_testing.interrupted import JOBS, Action, Bench, Mismatch, Schedule, Step
from flowprefill_testing.tiny_models import make_model

DROPPABLE = ("forward_context", "attn_backend", "model_config_overrides", "scheduler_stage")
"""Saved items that a forward of these models uses on a CPU."""
LEFT_OUT = (*DROPPABLE, "own attention backend", "own input tensors")
ADAPTERS = ("a", "b")
CONCURRENT = 2

FIXED = tuple(
    Schedule(
        jobs=jobs,
        steps=tuple(Step(j, n) for n in (first, 2, 3) for j in range(len(jobs))),
        ends=ends,
    )
    for jobs, first in (((0, 1), 3), ((4, 8), 5), ((8, 4), 7))
    for ends in (tuple(range(len(jobs))), tuple(reversed(range(len(jobs)))))
)
"""What every dropped item is tried with: batches of one shape, with and without a cached prefix, ends in both orders.
One shape, since Triton's kernels write out of bounds when they are given the index of a longer batch."""
LONGEST_CHECK_S = 120


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    jobs = draw(st.lists(st.integers(0, len(JOBS) - 1), min_size=3, max_size=6, unique=True))
    indices = st.integers(0, len(jobs) - 1)
    # A boundary count small enough that most steps end inside of a forward, which has 11 boundaries here.
    actions = st.sampled_from([Action.SUSPEND] * 12 + [Action.DISCARD, Action.FAIL])
    steps = draw(st.lists(st.builds(Step, indices, st.integers(1, 9), actions), min_size=3, max_size=20))
    ends = draw(st.permutations(range(len(jobs))))
    return Schedule(tuple(jobs), tuple(steps), tuple(ends))


def random_schedules(bench: Bench, count: int) -> int:
    """Number of schedules that were run; raises Mismatch with the smallest schedule found in its notes."""
    run = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(schedules())
    def interrupted_equals_uninterrupted(schedule: Schedule) -> None:
        nonlocal run
        run += 1
        bench.check(schedule)

    interrupted_equals_uninterrupted()
    return run


def tried(bench: Bench, schedule: Schedule) -> list[str]:
    """What goes wrong with a schedule."""
    try:
        bench.check(schedule)
    except Mismatch as mismatch:
        return list(mismatch.what)
    except RuntimeError as error:  # an operator that was given another batch's shapes
        return [str(error)[:80]]
    return []


def self_test(bench: Bench) -> list[str]:
    """What the start-up self-test says."""
    try:
        fault = interruption_fault(bench.engine.scheduler, bench.gate, bench.state)
    except RuntimeError as error:  # an operator that was given another batch's shapes
        fault = str(error)
    return [fault] if fault else []


def in_a_copy(work: Callable[[], list[str]]) -> list[str]:
    """What ``work`` finds in a copy of this process: broken state stays there, and so does a crash."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST_CHECK_S)
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        found = result.read()
    os.waitpid(child, 0)
    words: list[str] = json.loads(found) if found else ["crash"]
    return words


def broken(bench: Bench, names: Sequence[str]) -> dict[str, list[str]]:
    """What goes wrong with one thing left out at a time; ``nothing`` left out must go right."""
    for job in {job for schedule in FIXED for job in schedule.jobs}:
        bench.reference(job)

    def leave_out(name: str) -> None:
        if name == "own attention backend":
            del bench.engine.model_runner.eager_runner.__dict__["_execute_extend"]
        elif name == "own input tensors":
            os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "0"
        elif name != "nothing":
            bench.state = bench.make_state(without=[name])

    found = {}
    for name in ("nothing", *names):
        wrong = [in_a_copy(lambda n=name, s=schedule: leave_out(n) or tried(bench, s)) for schedule in FIXED]
        found[name] = sorted({word for words in wrong for word in words})
    if "own input tensors" in names:
        found["self-test without own input tensors"] = in_a_copy(
            lambda: leave_out("own input tensors") or self_test(bench)
        )
    return found


class LiveBytes(TorchDispatchMode):
    """Sees every tensor that is made, and counts those that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def living(self) -> dict[int, int]:
        return {place: size for place, (ref, size) in self._storages.items() if not ref.expired()}


def held_over_bound(bench: Bench, lengths: Sequence[int]) -> float:
    """The most that a forward holds at a boundary, over what ``activation_bound`` says."""
    engine, gate = bench.engine, bench.gate
    at_boundaries: list[dict[int, int]] = []
    mode = LiveBytes()

    def look() -> bool:
        gc.collect()  # what only a cycle of Python objects still names is free for the taking
        at_boundaries.append(mode.living())
        return False

    def run(batch: Any) -> None:
        with mode:
            engine.run(batch)

    engine.forget()
    requests = [engine.request(range(1, 1 + length)) for length in lengths]
    gate.watch(look)
    task = ForwardTask(lambda: run(engine.batch(requests)), gate, bench.state)
    assert task.advance()
    gate.watch(None)
    stays = mode.living()  # weights, KV and caches, of which views were made
    for request in requests:
        engine.release(request, keep=False)
    held = max(sum(size for place, size in living.items() if place not in stays) for living in at_boundaries)
    bound = activation_bound(engine.model_runner.model_config, dtype=engine.model_runner.dtype)
    return held / bound.bytes(sum(lengths))


def sliced(bench: Bench, count: int) -> dict[str, Any]:
    """The same with every operator in slices; and how far these are off whole ones."""
    whole = [bench.reference(job) for job in range(len(JOBS))]
    suspensions = bench.suspensions
    faults = slicing_faults(bench)
    bench.slice_operators()
    slices = bench.slices.slices
    distance = max(bench.reference(job).distance(outcome) for job, outcome in enumerate(whole))
    slices = bench.slices.slices - slices
    return {
        "faults": faults,
        "distance": distance,
        "scale": max(float(outcome.forwards[0][0].abs().max()) for outcome in whole),
        "slices": slices,
        "schedules": random_schedules(bench, count),
        "suspensions": bench.suspensions - suspensions,
        "held_over_bound": held_over_bound(bench, (40, 24)),
    }


def slicing_faults(bench: Bench) -> dict[str, str | None]:
    """What the start-up test of slicing says, by kind; and of linear layers that mix up their rows."""
    runner = bench.engine.model_runner
    install_cuts(bench.gate, bench.slices)
    work = work_of(runner.model)
    tiles = AttentionTiles(bench.slots.build, type(runner.attn_backend).__name__)

    def fault(kind: Kind) -> str | None:
        return slicing_fault(bench.engine.scheduler, bench.gate, bench.state, bench.slices, work, tiles, kind)

    found = {str(kind): fault(kind) for kind in work.all_kinds}
    cut = sliced_operators.row_slices
    sliced_operators.row_slices = lambda rows, limit: [(a, b) if a else (a, b - 1) for a, b in cut(rows, limit)]
    try:
        found["a row left out"] = fault(Kind.LINEAR)
    finally:
        sliced_operators.row_slices = cut
    return found


def report(directory: Path, architecture: str, backend: str, count: int, more: Sequence[str]) -> dict[str, Any]:
    is_broken_too, has_lora = "broken" in more, "lora" in more
    model = make_model(directory / "-".join(["models", backend, *more]), architecture)
    engine = OfflineEngine(
        str(model),
        attention_backend=backend,
        skip_tokenizer_init=True,
        max_total_tokens=2048,
        max_running_requests=32,
        log_level="error",
        **(lora_settings(model) if has_lora else {}),
    )
    with torch.no_grad():
        bench = Bench(engine, adapters=(*ADAPTERS, None) if has_lora else (None,))
        backend_class = type(engine.model_runner.attn_backend).__name__
        run = random_schedules(bench, count)
        found = {
            "schedules": run,
            "suspensions": bench.suspensions,
            "max_depth": bench.max_depth,
            "endings": dict(bench.endings),
            "attention": backend_class,
            "held_over_bound": held_over_bound(bench, (40, 24)),
            "self_test": self_test(bench),
        }
        if has_lora:
            return found | {"broken": broken(bench, ["lora_batch"])}
        return found | {"broken": broken(bench, LEFT_OUT) if is_broken_too else {}, "sliced": sliced(bench, count // 2)}


def lora_settings(model: Path) -> dict[str, Any]:
    """Of SGLang, for a model with adapters, all of which have a slot."""
    paths = {name: make_adapter(model.parent / name, model, seed) for seed, name in enumerate(ADAPTERS)}
    return {
        "enable_lora": True,
        "lora_backend": "torch_native",
        "max_loras_per_batch": len(ADAPTERS) + 1,
        "lora_paths": [
            LoRARef(lora_id=name, lora_name=name, lora_path=str(path), pinned=False) for name, path in paths.items()
        ],
    }


def fork(directory: Path, architecture: str, backend: str, count: str, *more: str) -> int:
    """Run one model in a child process; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        try:
            result = report(directory, architecture, backend, int(count), more)
            status = 0
        except BaseException as error:
            result = {"error": "".join(traceback.format_exception(error))}
        name = "-".join([architecture, backend, *(word for word in more if word == "lora")])
        (directory / f"{name}.json").write_text(json.dumps(result, indent=1))
    finally:
        os._exit(status)


def main(directory: Path, wanted: list[str]) -> None:
    running: set[int] = set()
    for word in wanted:
        if len(running) == CONCURRENT:
            running.discard(os.wait()[0])
        running.add(fork(directory, *word.split(":")))
    while running:
        running.discard(os.wait()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
