"""SGLang's CUDA graphs of prefills, for short ones only.

The replay of a graph is one operator: nothing can stop inside of it. That is right for a prefill that is predicted to
end within the blocking target, and launches it in one go; a longer one runs operator by operator. Whether a graph is
there for a batch at all remains SGLang's business (``PrefillCudaGraphRunner.can_run_graph`` of 0.5.23): it is asked
only when the running task is short. Forward passes outside of tasks, those of the start-up calibration above all, run
as most prefills do, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowprefill_sglang.integration.hooks import Hook, HookKind

TARGET = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph"


class GraphChoice:
    """Whether the forward pass that runs now may replay a graph. Owned by the scheduler's thread."""

    def __init__(self) -> None:
        self._may: Callable[[], bool] = _never

    def leave_to(self, may: Callable[[], bool]) -> None:
        """Ask this from now on."""
        self._may = may

    def may_replay(self) -> bool:
        """Asked by SGLang, through the hook, once a forward pass."""
        return self._may()


def _never() -> bool:
    return False


choice = GraphChoice()
"""This process's: SGLang has one scheduler in it, and a hook knows no other place."""


def hooks() -> list[Hook]:
    """Refuse graphs to everything that must be able to stop."""

    def around_can_run_graph(original: Callable[..., bool], runner: Any, *args: Any, **kwargs: Any) -> bool:
        return choice.may_replay() and original(runner, *args, **kwargs)

    return [
        Hook(
            target=TARGET,
            kind=HookKind.AROUND,
            function=around_can_run_graph,
            why="long prefills would be replayed from CUDA graphs, in which nothing can stop",
        )
    ]
