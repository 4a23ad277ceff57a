"""A prefill worker whose forward passes stand still until the test lets them go on, a layer at a time.

What happens while a prompt is half computed then happens there, however fast the machine is. SGLang's own
``--forward-hooks`` puts ``holder`` behind every decoder layer and behind the logits processor: *places*, which every
pass comes by in order, between two boundaries; behind the logits processor there is no boundary any more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from flowprefill_sglang.integration.prefill.control import control
from flowprefill_testing.clusters import wait_until

LAYERS = 4
"""Of the tiny model."""
PLACES = LAYERS + 1
"""Of one forward pass."""
STUCK, TO_THE_END = "stuck", "to the end"


def flags(folder: Path) -> list[str]:
    """Of a worker whose passes ``HeldPasses(folder)`` holds."""
    places = {
        "name": "held",
        "target_modules": ["model.layers.[0-9]", "logits_processor"],
        "hook_factory": "flowprefill_testing.held_passes:holder",
        "config": {"folder": str(folder)},
    }
    return ["--forward-hooks", json.dumps([places])]


def holder(config: dict[str, str]) -> Callable[..., None]:
    """Called by SGLang in its scheduler process; what it returns is called at every place, inside of the task."""
    allowed, reached = Path(config["folder"]) / "allowed", Path(config["folder"]) / "reached"
    count = 0

    def may_go_on(*, is_last: bool) -> bool:
        try:
            text = allowed.read_text()
        except FileNotFoundError:
            return True
        if text == STUCK:
            return False
        is_allowed = not is_last if text == TO_THE_END else count <= int(text)
        return is_allowed or control.loop is None or control.loop._gate._is_wanted()

    def at_a_place(module: object, *_: object) -> None:
        nonlocal count
        count += 1
        is_last = type(module).__name__ == "LogitsProcessor"
        if not may_go_on(is_last=is_last):
            _write(reached, f"{count} {int(is_last)}")
            while not may_go_on(is_last=is_last):
                time.sleep(0.002)
            reached.unlink()

    return at_a_place


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


class HeldPasses:
    """The test's end.

    A held pass goes on by itself to the next place when something has happened that it is to stop for, as it can only
    stop at a boundary between the two.
    """

    def __init__(self, folder: Path) -> None:
        self._allowed, self._reached = folder / "allowed", folder / "reached"

    def hold(self) -> None:
        """From now on a pass stands still at the next place it comes to."""
        _write(self._allowed, "0")

    def let(self, places: int) -> None:
        """Let the pass that stands still go on by so many places, those of the passes that follow it included."""
        at = self._wait(lambda place, _: place > 0) + places
        _write(self._allowed, str(at - 1))
        self._wait(lambda place, _: place >= at)

    def let_to_its_end(self) -> None:
        """Let it go on to its last place, behind its last boundary."""
        _write(self._allowed, TO_THE_END)
        self._wait(lambda _, is_last: is_last)

    def stick(self) -> None:
        """The pass that stands still, or comes to a place next, never goes on."""
        _write(self._allowed, STUCK)

    def free(self) -> None:
        """Nothing is held any more."""
        self._allowed.unlink(missing_ok=True)

    def _wait(self, is_there: Callable[[int, bool], bool]) -> int:
        """Until a pass stands still at such a place; its number, counted since the worker's start."""
        wait_until(lambda: is_there(*self._place()), timeout_s=60, pause_s=0.002)
        return self._place()[0]

    def _place(self) -> tuple[int, bool]:
        """Where a pass stands still, and whether that is its last place; 0 while none does."""
        try:
            number, is_last = self._reached.read_text().split()
        except FileNotFoundError:
            return 0, False
        return int(number), is_last == "1"
