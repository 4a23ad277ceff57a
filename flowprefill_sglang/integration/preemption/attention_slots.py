"""An attention backend of its own for every forward pass that can be suspended.

SGLang 0.5.23 has one attention backend object per model, and a forward keeps in it what its attention layers read:
torch_native an index translation, triton views of index buffers that are filled anew for each batch, flashinfer the
plan and integer workspace of its wrappers, hybrid models several of these. Saving references would not save the
buffers behind them, and a copy would have to know every backend. So a suspendable forward gets a whole backend object,
built by SGLang's own factory, and gives it back at its end. Memory pools, and with flashinfer the float workspace,
remain shared; both are right on one stream.

SGLang's own backend object stays where it is for everything else: CUDA graphs have captured its buffers, so a forward
that replays one must find its batch there. Such a forward goes past the eager runner, where the exchange is made, and
is never suspended (``operator_boundaries``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import sglang_version
from flowprefill_sglang.prefill_worker.boundaries import Gate

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class AttentionSlots:
    """The spare backends of one model. Owned by the scheduler's thread."""

    def __init__(self, model_runner: ModelRunner, gate: Gate) -> None:
        self._runner = model_runner
        self._gate = gate
        self._spare: list[Any] = []  # SGLang's attention backends

    def reserve(self, count: int) -> None:
        """Have ``count`` spare backends ready, so that no forward waits for one to be built."""
        while len(self._spare) < count:
            self._spare.append(self.build())

    def install(self) -> None:
        """Lend a backend to each eager forward of this model that runs inside of a task.

        Raises StartupError when SGLang's runner is not as expected.
        """
        runner = self._runner
        eager: Any = getattr(runner, "eager_runner", None)
        original = getattr(eager, "_execute_extend", None)
        if original is None or not hasattr(runner, "attn_backend"):
            raise StartupError(
                f"SGLang {sglang_version()} runs eager forwards in a way that FlowPrefill does not know: "
                "ModelRunner.eager_runner._execute_extend or ModelRunner.attn_backend is missing"
            )
        eager._execute_extend = self._lending(original)

    def _lending(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(execute)
        def execute_with_own_backend(*args: Any, **kwargs: Any) -> Any:  # SGLang's arguments and result
            if self._gate.is_closed:  # not a task's forward: start-up, self-test, an idle or mirrored batch
                return execute(*args, **kwargs)
            with self._own_backend():
                return execute(*args, **kwargs)

        return execute_with_own_backend

    @contextmanager
    def _own_backend(self) -> Iterator[None]:
        from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

        runner = self._runner
        own = self._spare.pop() if self._spare else self.build()
        home, runner.attn_backend = runner.attn_backend, own
        try:
            with forward_context(replace(get_forward_context(), attn_backend=own)):
                yield
        finally:
            runner.attn_backend = home
            self._spare.append(own)

    def build(self) -> Any:
        """One more attention backend of this model, as SGLang makes them."""
        from sglang.srt.model_executor.model_runner_components.attention_backend_setup import build_attention_backends

        backend = build_attention_backends(model_runner=self._runner).attn_backend
        self._runner.kv_index_translator.bind_and_verify_backends([backend])
        return backend
