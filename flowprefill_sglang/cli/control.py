"""``flowprefill status``, ``scale`` and ``logs``: ask the control port of a running ``up``."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from flowprefill_sglang.cluster.members import in_one_line
from flowprefill_sglang.errors import BadInput, PeerFault
from flowprefill_sglang.flag_values import count

_TIMEOUT_S = 30.0


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--control", metavar="URL", help="the control address that up prints")
    where.add_argument("--ready-file", type=Path, metavar="FILE", help="the file that up --ready-file writes")


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``status``."""
    _add_where(parser)
    parser.add_argument("--json", action="store_true", help="print the whole answer")


def run_status(namespace: argparse.Namespace) -> int:
    """Print the members. Raises BadInput and PeerFault."""
    status = json.loads(_ask(namespace, "/status"))
    if namespace.json:
        print(json.dumps(status, indent=2))
        return 0
    members = status["members"]
    ready = {kind: sum(m["state"] == "ready" for m in members if m["kind"] == kind) for kind in status["desired"]}
    print(f"{status['url']}  {status['model']}")
    print(", ".join(f"{kind}: {ready[kind]} of {wanted} ready" for kind, wanted in status["desired"].items()))
    gpus = {one["name"]: _short(one.get("gpus", "")) for one in members}
    width = max((len(names) + 2 for names in gpus.values() if names), default=0)
    title = f"{'GPUS':<{max(6, width)}}" if width else ""
    print(f"{'NAME':<12}{'STATE':<13}{'FOR':>8}{'RESTARTS':>10}  {'NODE':<10}{title}{'PID':<9}REASON")
    for one in members:
        reason, failure = one["reason"], in_one_line(one["last_failure"])
        if one["retry_in_s"] is not None:
            reason = f"again in {one['retry_in_s']:.0f} s"
        elif not reason:
            reason = one.get("doing", "")
        if failure:
            reason = f"{reason}{'; ' if reason else ''}last failure: {failure}"
        print(
            f"{one['name']:<12}{one['state']:<13}{one['for_s']:>6.0f} s{one['restarts']:>10}  "
            f"{one['node'][:8] or '-':<10}{gpus[one['name']]:<{len(title)}}{one['pid'] or '':<9}{reason}".rstrip()
        )
    return 0


def _short(gpus: str) -> str:
    """As many characters of each as tell UUIDs apart."""
    return ",".join(name[:12] for name in gpus.split(","))


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``scale``."""
    _add_where(parser)
    parser.add_argument("--prefill", type=count, metavar="N", help="prefill workers (default: as many as now)")
    parser.add_argument("--decode", type=count, metavar="M", help="decode instances (default: as many as now)")


def run_scale(namespace: argparse.Namespace) -> int:
    """Change the wanted numbers; returns before they are reached. Raises BadInput and PeerFault."""
    numbers = {kind: getattr(namespace, kind) for kind in ("prefill", "decode")}
    wanted = {kind: number for kind, number in numbers.items() if number is not None}
    if not wanted:
        raise BadInput("expected --prefill N, --decode M or both")
    desired = json.loads(_ask(namespace, "/scale", json.dumps(wanted).encode()))
    print(", ".join(f"{kind}: {number}" for kind, number in desired.items()) + "; 'flowprefill status' shows the way")
    return 0


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``logs``."""
    parser.add_argument("name", metavar="NAME", help="router, prefill-0, decode-0, …")
    _add_where(parser)
    parser.add_argument("--lines", type=count, default=100, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--follow", action="store_true", help="go on with what is written from now on, until Ctrl-C")


def run_logs(namespace: argparse.Namespace) -> int:
    """Print the end of a log. Raises BadInput and PeerFault."""
    follow = "&follow=1" if namespace.follow else ""
    path = f"/logs/{urllib.parse.quote(namespace.name, safe='')}?lines={namespace.lines}{follow}"
    if not namespace.follow:
        sys.stdout.write(_ask(namespace, path).decode(errors="replace"))
        return 0
    with _open(namespace, path, None, timeout_s=None) as response:
        while chunk := response.read1(65_536):
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()
    return 0


def _ask(namespace: argparse.Namespace, path: str, body: bytes | None = None) -> bytes:
    with _open(namespace, path, body, timeout_s=_TIMEOUT_S) as response:
        return response.read()


def _open(
    namespace: argparse.Namespace, path: str, body: bytes | None, timeout_s: float | None
) -> http.client.HTTPResponse:
    url = (namespace.control or _control_of(namespace.ready_file)).rstrip("/")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(url + path, body, timeout_s)
    except urllib.error.HTTPError as error:
        message = _message(error.read()) or f"{url}{path}: {error.code} {error.reason}"
        raise (BadInput if error.code in (400, 404) else PeerFault)(message) from error
    except ValueError as error:
        raise BadInput(f"--control {url}: expected http://HOST:PORT") from error
    except OSError as error:
        why = getattr(error, "reason", error)
        raise PeerFault(f"no pool answers at {url}: {getattr(why, 'strerror', None) or why}") from error
    return response


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _control_of(ready_file: Path) -> str:
    try:
        document: Any = json.loads(ready_file.read_text())
    except OSError as error:
        raise BadInput(f"--ready-file {ready_file}: {error.strerror}; is the cluster up?") from error
    except ValueError as error:
        raise BadInput(f"--ready-file {ready_file}: this is no JSON") from error
    control = document.get("control") if isinstance(document, dict) else None
    if not isinstance(control, str):
        raise BadInput(f"--ready-file {ready_file} names no control address: expected what up --ready-file writes")
    return control
