"""The ``flowprefill`` command: one subcommand a role.

Exit status 0 only when what was asked for was done, 1 when it failed, 2 for wrong use, 141 when nobody reads the output
any more. Only the module of the chosen subcommand is imported, and only when it runs: SGLang's spawned children import
this module again.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TextIO

from flowprefill_sglang.cluster.process import die_with_parent
from flowprefill_sglang.errors import BadInput, FlowPrefillError

OUTPUT_CLOSED = 141
"""What a shell reports of a command that SIGPIPE ended, which Python ignores."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: ``add_<name>_arguments(parser)`` and ``run_<name>(namespace) -> exit status`` of ``module``.

    Its name has one word or two; ``_`` stands between two in the functions' names.
    """

    module: str
    help: str
    reads_file: bool = False
    """Whether ``set_<name>_defaults(parser, namespace)`` takes flags' defaults from a file that a flag names."""
    passes_on: bool = False
    """Whether flags that are not its own go to SGLang's servers, as ``namespace.rest``."""


COMMANDS = {
    "up": Command(module="up", help="run a whole cluster on this machine", passes_on=True, reads_file=True),
    "config check": Command(module="config", help="check a cluster's YAML file and show what it would start"),
    "config show": Command(module="config", help="print a complete YAML file: every field, its default and why"),
    "status": Command(module="control", help="show the members of a running pool"),
    "scale": Command(module="control", help="change how many members a running pool has"),
    "logs": Command(module="control", help="print the log of a member of a running pool"),
    "demo": Command(module="demo", help="run a workload under FlowPrefill and under stock SGLang, side by side"),
    "bench": Command(module="bench", help="load a server in open loop; measure TTFT, attainment and goodput"),
    "bench compare": Command(module="bench_compare", help="ratios between two results of bench, with their spread"),
    "bench suite": Command(
        module="bench_suite", help="measure FlowPrefill and every stock scheduler on this machine", passes_on=True
    ),
    "timeline": Command(module="timeline", help="watch a cluster's prefill workers and draw what ran when"),
    "profile": Command(module="profile", help="measure what prefill costs on this hardware and model", passes_on=True),
    "simulate": Command(module="simulate", help="compare scheduling policies on a virtual clock"),
    "router": Command(module="roles", help="run the router"),
    "prefill": Command(module="roles", help="run a prefill worker", passes_on=True),
    "decode": Command(module="roles", help="run a decode instance, which is stock SGLang", passes_on=True),
    "version": Command(module="roles", help="print the versions that a bug report needs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit status.

    Ends without a word, as Unix tools do, when what reads its output has ended (``flowprefill version | head -1``).
    """
    die_with_parent()
    try:
        try:
            status = _run(arguments)
        except SystemExit:  # argparse's, after it has printed its help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here and not when the interpreter ends, which would say so with a traceback
    except BrokenPipeError:
        if not _silenced():
            raise  # of a socket
        return OUTPUT_CLOSED
    return status


def _silenced() -> bool:
    """Whether nobody reads standard output or error any more; what is left in them then goes nowhere, instead of
    raising once more when the interpreter ends."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody has open for reading."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _run(arguments: Sequence[str] | None) -> int:
    words = _with_whole_name(sys.argv[1:] if arguments is None else arguments)
    chosen = words[0] if words and words[0] in COMMANDS else None
    parser, subparser = _parser(chosen)
    try:
        namespace, rest = parser.parse_known_args(words)
        if chosen is not None and COMMANDS[chosen].reads_file:
            _function(chosen, "set_{}_defaults")(subparser, namespace)
            namespace, rest = parser.parse_known_args(words)  # what the command line says wins over the file
    except FlowPrefillError as error:
        return _failed(chosen, error)
    if rest and (chosen is None or not COMMANDS[chosen].passes_on):
        (subparser or parser).error(f"unrecognized arguments: {' '.join(rest)}")
    namespace.rest = rest
    try:
        return _function(namespace.command, "run_{}")(namespace)
    except FlowPrefillError as error:
        return _failed(namespace.command, error)
    except KeyboardInterrupt:
        return 130


def _failed(command: str | None, error: FlowPrefillError) -> int:
    print(f"flowprefill {command}: {error}", file=sys.stderr)
    return 2 if isinstance(error, BadInput) else 1


def _with_whole_name(arguments: Sequence[str]) -> list[str]:
    """The words of the command line, with a subcommand of two words as one."""
    words = list(arguments)
    name = " ".join(words[:2])
    return [name, *words[2:]] if name in COMMANDS else words


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    parser = argparse.ArgumentParser(
        prog="flowprefill",
        description="FlowPrefill on SGLang: a router, preemptive prefill workers and KV handoff to decode instances.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparser = None
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help.capitalize() + ".",
            epilog="Other flags go to SGLang unchanged; 'sglang serve --help' lists them."
            if command.passes_on
            else None,
            allow_abbrev=False,
        )
        if name == chosen:
            subparser = added
            _function(name, "add_{}_arguments")(added)
    return parser, subparser


def _function(name: str, pattern: str) -> Callable[..., int]:  # add_… takes a parser, run_… a namespace
    module = import_module(f"flowprefill_sglang.cli.{COMMANDS[name].module}")
    function: Callable[..., int] = getattr(module, pattern.format(name.replace(" ", "_")))
    return function
