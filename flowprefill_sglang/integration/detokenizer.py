"""Whether SGLang's detokenizer process works: all text goes through it, and it may hang while the others answer.

SGLang 0.5.23 answers a health check from the scheduler while that is busy, past the detokenizer (a comment in
``Scheduler.maybe_send_health_check_signal`` says so): a server whose detokenizer hangs is healthy as long as it has
work, and answers nobody. The hooks send that answer the way of all others. Beside, a prefill worker's HTTP process asks
the detokenizer alone (``Questions``), which costs the scheduler nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import zmq

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import Hook, HookKind, sglang_version

_ADDRESS: Final = "flowprefill_detokenizer_address"


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers."""
    return [
        Hook(
            target="sglang.srt.managers.detokenizer_manager.DetokenizerManager.init_request_dispatcher",
            kind=HookKind.AFTER,
            function=pass_health_answers_on,
            why="the detokenizer would end at the first health check while the scheduler is busy",
        ),
        Hook(
            target="sglang.srt.managers.scheduler.Scheduler.maybe_send_health_check_signal",
            kind=HookKind.AROUND,
            function=answer_through_detokenizer,
            why="a detokenizer that hangs would not be noticed while there is work",
        ),
        Hook(
            target="sglang.srt.managers.tokenizer_manager.TokenizerManager.init_ipc_channels",
            kind=HookKind.AFTER,
            function=keep_address,
            why="the detokenizer could not be asked whether it works",
        ),
    ]


def check() -> None:
    """Raises StartupError unless SGLang has the message that is passed on."""
    from sglang.srt.managers import io_struct

    if not hasattr(io_struct, "HealthCheckOutput"):
        raise StartupError(f"SGLang {sglang_version()} has no io_struct.HealthCheckOutput; install sglang==0.5.23")


def pass_health_answers_on(result: None, manager: Any) -> None:  # SGLang's DetokenizerManager
    """After ``init_request_dispatcher``: what is a health answer leaves as it came."""
    from sglang.srt.managers.io_struct import HealthCheckOutput
    from sglang.utils import TypeBasedDispatcher

    manager._request_dispatcher += TypeBasedDispatcher([(HealthCheckOutput, lambda answer: answer)])


def answer_through_detokenizer(original: Callable[[Any], None], scheduler: Any) -> None:  # SGLang's Scheduler
    """Around ``maybe_send_health_check_signal``: one answer a call, as there.

    With several detokenizers, of which each text needs another one, and with SGLang's server in Rust, which has its own
    way, it is SGLang's.
    """
    if not scheduler.return_health_check_ipcs:
        return
    from sglang.srt.managers.io_struct import HealthCheckOutput
    from sglang.srt.runtime_context import get_serving

    if scheduler.rust_server is not None or get_serving().detokenizer_worker_num != 1:
        original(scheduler)
        return
    answer = HealthCheckOutput(http_worker_ipc=scheduler.return_health_check_ipcs.popleft())
    scheduler.ipc_channels.send_to_detokenizer.send_output(answer)


def keep_address(result: None, manager: Any, port_args: Any) -> None:  # SGLang's TokenizerManager, PortArgs
    """After ``init_ipc_channels``: remember where the detokenizer listens."""
    setattr(manager, _ADDRESS, port_args.detokenizer_ipc_name)


class Questions:
    """Asks the detokenizer process. Used on the event loop that SGLang's tokenizer manager reads answers on."""

    def __init__(self, manager: Any) -> None:  # SGLang's TokenizerManager, with one detokenizer
        from sglang.srt.managers.io_struct import HealthCheckOutput

        self._socket = manager.recv_from_detokenizer.context.socket(zmq.PUSH)
        self._socket.linger = 0
        self._socket.connect(getattr(manager, _ADDRESS))
        self._answered = asyncio.Event()
        manager._result_dispatcher._mapping[HealthCheckOutput] = self._on_answer

    async def ask(self) -> None:
        """Return when the detokenizer has answered: this question, an earlier one, or a health check."""
        from sglang.srt.managers.io_struct import HealthCheckOutput, async_sock_send

        self._answered.clear()
        await async_sock_send(self._socket, HealthCheckOutput())
        await self._answered.wait()

    def _on_answer(self, answer: Any) -> None:  # SGLang's HealthCheckOutput, which says nothing
        self._answered.set()
