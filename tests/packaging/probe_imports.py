"""A program for test_installs.py: says, as JSON, where each name given as an argument is imported from.

Run as a script, with ``-m`` or with ``-c``. Uses the standard library only, so that it runs in any environment.
Output: ``{name: [in this process, in a spawned child]}``; a place is the module's file, ``namespace:<folder>`` for a
package without one, or null when there is no such module.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys


def locate(names: list[str]) -> dict[str, str | None]:
    return {name: place_of(name) for name in names}


def place_of(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the module is there and lacks something itself
        return None
    return module.__file__ or f"namespace:{next(iter(module.__path__))}"


def main() -> None:
    names = sys.argv[1:]
    here = locate(names)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(locate, (names,))
    json.dump({name: [here[name], child[name]] for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
