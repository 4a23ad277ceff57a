"""A progress bar on standard error for loads that follow each other; silent where that is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class LoadProgress:
    """``with LoadProgress() as progress: advance = progress.load("repeat 1 of 3", 200)``"""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def load(self, what: str, requests: int) -> Callable[[], None]:
        """A load begins, in place of the one before; call the result once for each request that ended."""
        for task_id in self._progress.task_ids:
            self._progress.remove_task(task_id)
        bar = self._progress.add_task(escape(what), total=requests)
        return lambda: self._progress.advance(bar)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something of unknown length."""
        bar = self._progress.add_task(escape(what), total=None)
        try:
            yield
        finally:
            self._progress.remove_task(bar)
