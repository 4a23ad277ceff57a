"""A cluster's configuration from one YAML file: read, checked, and handed on as what ``flowprefill up`` starts.

Every mistake is BadInput with one line: file, line, field, what was expected, and the value that is there.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from flowprefill_sglang.cluster.configuration_fields import SECTIONS, ClusterFile, Field, fields_of
from flowprefill_sglang.cluster.yaml_document import FieldPath, YamlDocument
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.config import RouterConfig, parse_slo_class
from flowprefill_sglang.router.objectives import CUSTOM, LARGEST_SLO_MS, LEAST_SLO_MS, NO_CLASS

SET_ELSEWHERE: Final[Mapping[str, str]] = {
    "model-path": "model.path",
    "model": "model.path",
    "host": "router.host",
    "port": "router.port",
    "api-key": "router.api_key",
    "device": "launcher.device",
    "prefill-scheduler": "prefill.scheduler",
    **{field.flag.lstrip("-"): f"prefill.{field.name}" for field in SECTIONS["prefill"] if field.flag is not None},
}
"""Flags that have a field of their own."""
SET_BY_US: Final = frozenset({"router", "name", "disaggregation-mode", "disaggregation-bootstrap-port"})
"""Flags that the launcher alone can know."""
_HAVE_FLAGS_OF_UP: Final = frozenset({"host", "port", "api_key"})
"""Fields of the router that reach it by themselves, since ``flowprefill up`` has flags for them."""

_PATH: Final = re.compile(r"^(.*?)(?: - at `\$(.*)`)?$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_FLAG_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FLAG_OF_THE_ROUTER: Final = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True, kw_only=True)
class Configured:
    """What a file asks for: the values of ``flowprefill up``'s flags, and flags for the processes."""

    model_path: Path | None
    prefill: int
    decode: int
    host: str
    port: int
    api_key: str | None
    prefill_scheduler: str
    log_dir: Path | None
    launcher: str
    """``local`` or ``ray``."""
    ray_address: str | None
    share_gpus: bool
    threads: int | None
    startup_timeout_s: float
    router_arguments: tuple[str, ...]
    prefill_arguments: tuple[str, ...]
    decode_arguments: tuple[str, ...]
    sglang_arguments: tuple[str, ...]
    """Of every SGLang server."""


def read_configuration(path: Path) -> Configured:
    """The configuration in a file. Raises BadInput, in one line."""
    document = YamlDocument(path)
    values = _checked(document)
    router, prefill, launcher = values["router"], values["prefill"], values["launcher"]
    if launcher["ray_address"] is not None and launcher["kind"] != "ray":
        raise document.wrong(("launcher", "ray_address"), "null, since launcher.kind is not ray")
    if launcher["share_gpus"] and launcher["kind"] == "ray":
        raise document.wrong(("launcher", "share_gpus"), "false, since launcher.kind is ray")
    classes = _slo_classes(document, router)
    _check_router(document, router, classes)
    folder = path.absolute().parent
    if prefill["cost_file"] is not None:
        prefill["cost_file"] = str(folder / prefill["cost_file"])
    device = ("--device", launcher["device"]) if launcher["device"] is not None else ()
    flags = {section: _sglang_flags(document, section, values[section]) for section in ("prefill", "decode", "servers")}
    return Configured(
        model_path=_from(folder, values["model"]["path"]),
        prefill=prefill["count"],
        decode=values["decode"]["count"],
        host=router["host"],
        port=router["port"],
        api_key=router["api_key"],
        prefill_scheduler=prefill["scheduler"],
        log_dir=_from(folder, values["logs"]["dir"]),
        launcher=launcher["kind"],
        ray_address=launcher["ray_address"],
        share_gpus=launcher["share_gpus"],
        threads=values["servers"]["threads"],
        startup_timeout_s=launcher["startup_timeout_secs"],
        router_arguments=(*_own_flags("router", router), *(part for one in classes for part in ("--slo-class", one))),
        prefill_arguments=(*_own_flags("prefill", prefill), *flags["prefill"]),
        decode_arguments=flags["decode"],
        sglang_arguments=(*device, *flags["servers"]),
    )


def _from(folder: Path, path: str | None) -> Path | None:
    return None if path is None else folder / path


def _checked(document: YamlDocument) -> dict[str, dict[str, Any]]:
    """The values of every section, defaults included."""
    content = {} if document.content is None else document.content
    if not isinstance(content, dict):
        raise BadInput(f"{document.path}: expected sections ({', '.join(SECTIONS)}), not {document.shown(())}")
    # A section or mapping whose lines are all commented out is null to YAML.
    content = {name: {} if section is None else section for name, section in content.items()}
    for section in content.values():
        if isinstance(section, dict):
            section.update({name: {} for name in ("sglang", "slo_classes") if section.get(name, {}) is None})
    try:
        parsed = msgspec.convert(content, ClusterFile)
    except msgspec.ValidationError as error:
        raise _explained(document, error) from error
    sections: dict[str, dict[str, Any]] = {
        name: {field: getattr(section, field) for field in fields_of(name)}
        for name, section in msgspec.structs.asdict(parsed).items()
    }
    for section, values in sections.items():
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise document.wrong((section, name), fields_of(section)[name].kind.expected)
    return sections


def _explained(document: YamlDocument, error: msgspec.ValidationError) -> BadInput:
    """msgspec's error, which has the field's path, with what the field wants and what is there instead."""
    text, path = cast(re.Match[str], _PATH.match(str(error))).groups()
    where: FieldPath = tuple(part for part in (path or "").split(".") if part)
    if (unknown := _UNKNOWN.fullmatch(text)) is not None:
        name = unknown[1]
        known = list(fields_of(str(where[0]))) if where else list(SECTIONS)
        what = "field" if where else "section"
        return BadInput(f"{document.at((*where, name))}: no such {what}; {_suggestion(name, known, where)}")
    if len(where) == 1:
        return document.wrong(where, f"a mapping with any of {', '.join(fields_of(str(where[0])))}")
    field = fields_of(str(where[0]))[str(where[1])]
    if field.name == "api_key":  # not repeated: errors end up in logs
        return BadInput(f"{document.at(where)}: expected {field.kind.expected}; quote a key of digits alone")
    return document.wrong(where[:2], field.kind.expected + _hint(document.shown(where[:2]), field))


def _suggestion(name: str, known: list[str], where: FieldPath) -> str:
    """The nearest name, or where another section has this one, or all there are."""
    wanted = name.lower().replace("-", "_").lstrip("_")
    near = difflib.get_close_matches(wanted, known, n=1) or [one for one in known if wanted in one.split("_")]
    if near and where:
        return f"did you mean {near[0]}?"
    elsewhere = [
        f"{section}.{field}"
        for section in SECTIONS
        for field in fields_of(section)
        if wanted in (field, f"{section}_{field}")
    ]
    if elsewhere or near:
        return f"did you mean {' or '.join(elsewhere or near)}?"
    sglang = " (SGLang's own flags go below sglang)" if "sglang" in known else ""
    return f"there are {', '.join(known)}{sglang}" if where or len(known) > 1 else f"there is {known[0]}"


def _hint(shown: str, field: Field) -> str:
    """YAML reads 1e3 as text, and so does it everything in quotes."""
    try:
        float(shown.strip("'"))
    except ValueError:
        return ""
    is_number = "number" in field.kind.expected and not shown.lstrip("-").replace(".", "", 1).isdecimal()
    return " (in digits, without quotes or exponent)" if is_number else ""


def _slo_classes(document: YamlDocument, router: dict[str, Any]) -> list[str]:
    """The classes as the router's flag has them, ``NAME=MS``."""
    found = []
    for name, milliseconds in router["slo_classes"].items():
        where = ("router", "slo_classes", name)
        is_number = isinstance(milliseconds, int | float) and not isinstance(milliseconds, bool)
        text = f"{name}={milliseconds if is_number else 'none'}"
        if name in {*NO_CLASS, CUSTOM}:
            raise BadInput(f"{document.at(where)}: the name {name} has a meaning of its own; take another")
        try:
            parse_slo_class(text)
        except BadInput as error:
            bounds = f"{LEAST_SLO_MS:g} to {LARGEST_SLO_MS:.0f}"
            expected = f"a name of letters, digits, '.', '_' and '-' with milliseconds from {bounds}"
            raise document.wrong(where, expected) from error
        found.append(text)
    return found


def _check_router(document: YamlDocument, router: dict[str, Any], classes: list[str]) -> None:
    """What the router itself would refuse, in the file's words instead of its flags'."""
    own = {name: value for name, value in router.items() if name != "slo_classes"}
    try:
        RouterConfig(**own, slo_class=tuple(classes))
    except BadInput as error:
        flag = _FLAG_OF_THE_ROUTER.search(str(error))
        name = flag[1].replace("-", "_") if flag is not None else ""
        words = _FLAG_OF_THE_ROUTER.sub(lambda found: "router." + found[1].replace("-", "_"), str(error))
        where = ("router", name) if name in router else ("router",)
        raise BadInput(f"{document.at(where)}: {words.removeprefix(f'router.{name} ')}") from error


def _own_flags(section: str, values: Mapping[str, Any]) -> list[str]:
    """The process's own flags for everything that is not its default."""
    flags: list[str] = []
    for field in SECTIONS[section]:
        value = values[field.name]
        if field.flag is None or value == field.default or (section == "router" and field.name in _HAVE_FLAGS_OF_UP):
            continue
        flags += [field.flag] if value is True else [field.flag, str(value)]
    return flags


def _sglang_flags(document: YamlDocument, section: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    flags: list[str] = []
    for key, value in values["sglang"].items():
        where = (section, "sglang", key)
        name = str(key).replace("_", "-")
        if not _FLAG_NAME.fullmatch(name):
            bare = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "tp-size"
            raise BadInput(f"{document.at(where)}: expected a flag of SGLang's without dashes in front, as in {bare}")
        if name in SET_BY_US:
            raise BadInput(f"{document.at(where)}: the launcher sets --{name} itself; leave it out")
        if name in SET_ELSEWHERE:
            raise BadInput(f"{document.at(where)}: use the field {SET_ELSEWHERE[name]} instead")
        flags += _sglang_flag(document, where, name, value)
    return tuple(flags)


def _sglang_flag(document: YamlDocument, where: FieldPath, name: str, value: object) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value, default=str)]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise document.wrong(where, "text, a number, true, a list of these, or a mapping (as JSON); else leave it out")
    return [f"--{name}", *(str(one) for one in values)]
