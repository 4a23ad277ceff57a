"""The generated model: byte-exact tokenizer, same bytes for a seed, made once, printable, and told apart by its KV."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.workload.tiny_model import BOS, TinyModelShape, default_model_dir, make_tiny_model
from flowprefill_testing.together import make_model_after

SMALL = TinyModelShape(hidden_size=32, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(model: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


@given(text=st.text())
def test_one_token_per_byte_and_back(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids) == text


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, second = make_tiny_model(tmp_path / "a", SMALL), make_tiny_model(tmp_path / "b", SMALL)
    assert digests(first) == digests(second)
    other = make_tiny_model(tmp_path / "a", TinyModelShape(**{**vars_of(SMALL), "seed": 1}))
    assert other != first
    assert digests(other)["model.safetensors"] != digests(first)["model.safetensors"]


def vars_of(shape: TinyModelShape) -> dict[str, int]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def test_an_existing_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, SMALL)
    (folder / "model.safetensors").write_bytes(b"kept")
    assert make_tiny_model(tmp_path, SMALL) == folder
    assert (folder / "model.safetensors").read_bytes() == b"kept"


def test_concurrent_callers_get_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=make_model_after, args=(barrier, tmp_path, SMALL, results)) for _ in range(4)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    results.close()
    assert len(folders) == 1
    assert [p.name for p in tmp_path.iterdir()] == [Path(*folders).name], "a half-made folder was left behind"
    assert digests(Path(*folders)) == digests(make_tiny_model(tmp_path / "alone", SMALL))


def test_only_printable_tokens_can_win(model: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(model / "model.safetensors")
    alive = np.flatnonzero(np.abs(weights["lm_head.weight"]).sum(axis=1))
    assert alive.tolist() == list(range(0x20, 0x7F))


def test_paired_heads_share_values_and_cancel(model: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(model / "model.safetensors")
    values = weights["model.layers.0.self_attn.v_proj.weight"]
    output = weights["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(values[:64], values[64:])
    np.testing.assert_array_equal(output[:, :64], -output[:, 64:])


def test_readable_by_others_and_float32(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert model.stat().st_mode & 0o055 == 0o055
    assert (model / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_model_dir() == tmp_path / "flowprefill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_model_dir() == tmp_path / "home" / ".cache" / "flowprefill"


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 3}, {"hidden_size": 130}, {"vocab_size": 257}])
def test_impossible_shapes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TinyModelShape(**wrong)
