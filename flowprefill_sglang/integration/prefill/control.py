"""Control requests while tasks are under way: hooks that let SGLang's scheduler see them, and keep what must not meet
a suspended forward pass away from it.

SGLang 0.5.23 assumes that between two turns of its loop no forward pass is half done, and that it knows every request:
waiting, in ``chunked_req``, or in the running batch. With suspended tasks neither holds.

* abort: SGLang marks the requests of tasks too; those whose whole task is aborted are freed before the next turn;
* flush_cache: refused, as while a batch runs (``is_fully_idle`` is False);
* pause: every task under way ends first, as SGLang's running batch does; half-prefilled requests stay as they are;
* weight update, LoRA load and unload, memory resume, in any form: everything begun ends first, half-prefilled prompts
  included, so that no request sees two sets of weights;
* memory release: refused unless nothing is begun and nothing waits, where SGLang's assertion would end the worker;
* health check: answered at once, as while a batch runs;
* load: what is begun counts as running, and its tokens as still to be computed;
* shutdown: the loop ends and discards what is suspended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.integration.hooks import Hook, HookKind

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

NO_TASKS_BEYOND = frozenset({"PauseGenerationReqInput"})
"""Requests before which every task under way ends; names of classes in ``sglang.srt.managers.io_struct``."""

NOTHING_BEGUN_BEYOND = frozenset(
    {
        "UpdateWeightFromDiskReqInput",
        "UpdateWeightsFromDistributedReqInput",
        "UpdateWeightsFromTensorReqInput",
        "UpdateWeightsFromIPCReqInput",
        "BeginWeightUpdateReqInput",
        "EndWeightUpdateReqInput",
        "CheckWeightsReqInput",  # one of its actions, reset_tensors, overwrites them
        "ReleaseMemoryOccupationReqInput",
        "ResumeMemoryOccupationReqInput",
        "LoadLoRAAdapterReqInput",
        "LoadLoRAAdapterFromTensorsReqInput",
        "UnloadLoRAAdapterReqInput",
        "PdRoleSwitchReqInput",
        "ScaleElasticEPReqInput",
        "RpcReqInput",
    }
)
"""Requests before which half-prefilled prompts end as well."""


class Begun(Protocol):
    """What the hooks need of the loop that runs in this process."""

    def finish_what_is_begun(self, *, half_prefilled: bool) -> None:
        """Run every task to its end; with ``half_prefilled``, the remaining chunks of those prompts as well."""

    def withdraw_what_is_gone(self) -> None:
        """Forget and free what SGLang has dropped or marked as aborted."""

    def begun_reqs(self) -> list[Req]:
        """Every request that is in a task or half-prefilled."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """Looks like a batch to the code of SGLang that collects requests in flight."""

    reqs: Sequence[Any]  # SGLang's Req


class Control:
    """This process's loop, once it runs. The hooks are in place long before, and then do nothing."""

    def __init__(self) -> None:
        self.loop: Begun | None = None

    def before(self, names: set[str]) -> None:
        """Make way for control requests of these classes."""
        if self.loop is not None and names & NOTHING_BEGUN_BEYOND:
            self.loop.finish_what_is_begun(half_prefilled=True)
        elif self.loop is not None and names & NO_TASKS_BEYOND:
            self.loop.finish_what_is_begun(half_prefilled=False)

    def after(self, names: set[str]) -> None:
        """Follow what SGLang did with requests of these classes."""
        if self.loop is not None and "AbortReq" in names:
            self.loop.withdraw_what_is_gone()

    def begun_reqs(self) -> list[Req]:
        """Every request that is in a task or half-prefilled."""
        return [] if self.loop is None else self.loop.begun_reqs()


control = Control()
"""This process's; a module global because SGLang applies hooks before it makes its scheduler."""


def hooks() -> list[Hook]:
    """Let SGLang's scheduler see what is under way."""

    def around_process_input_requests(original: Callable[..., None], scheduler: Any, recv_reqs: list[Any]) -> None:
        names = {type(request).__name__ for request in recv_reqs}
        control.before(names)
        original(scheduler, recv_reqs)
        control.after(names)

    def around_is_fully_idle(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        return not control.begun_reqs() and original(*args, **kwargs)

    def after_collect_inflight_batches(batches: list[Any], *args: Any) -> list[Any]:
        return [*batches, InFlight(control.begun_reqs())]

    def after_get_loads(load: Any, *args: Any) -> None:  # SGLang's LoadSnapshot
        begun = control.begun_reqs()
        load.num_running_reqs += len(begun)
        load.num_waiting_uncached_tokens += sum(max(0, req.seqlen - req.prefix_len) for req in begun)

    async def around_release_memory_occupation(
        original: Callable[..., Awaitable[None]], manager: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not (await manager.flush_cache()).success:  # as the release does, of the KV cache at least
            raise BadInput("memory is released only while nothing is under way or waiting; drain or abort it first")
        await original(manager, *args, **kwargs)

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    return [
        Hook(
            target=f"{scheduler}.process_input_requests",
            kind=HookKind.AROUND,
            function=around_process_input_requests,
            why="weights could change under a suspended forward pass, and an abort would not reach it",
        ),
        Hook(
            target=f"{scheduler}.is_fully_idle",
            kind=HookKind.AROUND,
            function=around_is_fully_idle,
            why="the cache could be flushed while suspended forward passes read it",
        ),
        Hook(
            target=f"{scheduler}._collect_inflight_batches",
            kind=HookKind.AFTER,
            function=after_collect_inflight_batches,
            why="aborts and time-outs would not find suspended requests",
        ),
        Hook(
            target="sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer.get_loads",
            kind=HookKind.AFTER,
            function=after_get_loads,
            why="/v1/loads would not count suspended requests",
        ),
        Hook(
            target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.release_memory_occupation",
            kind=HookKind.AROUND,
            function=around_release_memory_occupation,
            why="a release of memory while anything is under way would end the worker",
        ),
    ]
