"""Cost models by name or file: a built-in ``MODEL-tpN-GPU``, a file of ``flowprefill profile`` or of a roofline."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from flowprefill_sglang.core.cost_file import FORMAT, CostFile
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.sim.roofline import GpuFigures, ModelShape, Roofline

DEFAULT_COST_MODEL: Final = "llama-3-8b-tp1-a800"
DEFAULT_LAYERS: Final = 32
_NAME = re.compile(r"(?P<model>.+)-tp(?P<tp>[1-9][0-9]?)-(?P<gpu>[^-]+)")
_Content = TypeVar("_Content", ModelShape, GpuFigures)


def built_in(folder: str) -> list[str]:
    """Names of the built-in ``models`` or ``gpus``."""
    return sorted(file.name.removesuffix(".json") for file in _data(folder).iterdir() if file.name.endswith(".json"))


def load_machine(name_or_file: str, layers: int = DEFAULT_LAYERS) -> Machine:
    """The machine of a built-in name or of a JSON file.

    ``layers``: of the model behind a file of ``flowprefill profile``, which does not say how many. Raises BadInput,
    with what is wrong and where.
    """
    path = Path(name_or_file)
    if path.is_file():
        return _from_file(path, layers)
    match = _NAME.fullmatch(name_or_file)
    if match and match["model"] in built_in("models") and match["gpu"] in built_in("gpus"):
        model, gpu = _read("models", match["model"], ModelShape), _read("gpus", match["gpu"], GpuFigures)
        return Roofline(model=model, gpu=gpu, tp_size=int(match["tp"])).machine()
    raise BadInput(
        f"--cost-model: {name_or_file!r} is no file and no built-in MODEL-tpN-GPU; models: "
        f"{', '.join(built_in('models'))}; GPUs: {', '.join(built_in('gpus'))}"
    )


def _from_file(path: Path, layers: int) -> Machine:
    try:
        data = path.read_bytes()
        document = msgspec.json.decode(data)
        if isinstance(document, dict) and "coefficients" in document:
            return _fitted(msgspec.json.decode(data, type=CostFile), layers)
        return msgspec.json.decode(data, type=Roofline).machine()
    except OSError as error:
        raise BadInput(f"--cost-model: {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: no UTF-8, or a value that a struct refuses
        raise BadInput(f"--cost-model: {path} is no cost model: {error}") from error


def _fitted(content: CostFile, layers: int) -> Machine:
    if content.format != FORMAT:
        raise ValueError(f"its format is {content.format}, this version reads {FORMAT}")
    name = f"{content.model.architecture}, TP{content.model.tp_size}, {content.hardware.name}"
    return Machine(name=name, cost=content.coefficients, layers=layers, operators=LLAMA_LIKE)


def _read(folder: str, name: str, kind: type[_Content]) -> _Content:
    return msgspec.json.decode((_data(folder) / f"{name}.json").read_bytes(), type=kind)


def _data(folder: str) -> Traversable:
    return files("flowprefill_sglang.sim") / "data" / folder
