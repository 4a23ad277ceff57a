"""A small random-weight Llama with a byte-level tokenizer, made on the spot: no download, the same bytes for a seed.

The demo, the tests and the benchmarks that measure the system rather than a model use it. What they need from it:

* one token per byte of UTF-8, so that lengths in tokens are lengths in bytes (plus ``<bos>``);
* the output depends on the whole prompt, so that a request that was served with a wrong page of KV answers differently.
  Plain random weights do not give that: over thousands of tokens every attention output is nearly the same mean, and
  the answer follows from the last few tokens. Here two heads share their values and are subtracted from each other
  (the differential attention of arXiv:2410.05258, built into ordinary weights), which cancels the mean and leaves what
  distinguishes this prompt; the embedding is small beside it, and a RoPE base of 100 makes positions count;
* attention logits small enough (standard deviation about 2) that float32 rounding, which differs between batch and
  chunk sizes, stays some thousand times below the usual gap between the two best logits: greedy output is the same
  however the work was cut;
* the output rows of every token that is not printable ASCII are zero, so that answers are readable text, never end
  early, and split at any token without breaking a UTF-8 sequence;
* fast on PyTorch's own attention, which is several times slower for grouped than for plain multi-head attention when it
  decodes: as many KV heads as query heads, of 64 dimensions (the least that every GPU attention backend takes).

``docs/workload.md`` has the measured numbers. Files are those that SGLang and transformers 5 read: ``config.json``,
``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json`` and ``model.safetensors`` (float32).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

BOS, EOS = 256, 257
RECIPE = 4
"""Goes into the folder's name: raise it whenever the same shape would give other bytes, or a stale folder is used."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyModelShape:
    """Shape of the generated model; the defaults prefill about ten thousand tokens per second on one CPU core."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    """Even: heads work in pairs. There are as many KV heads. Also the largest tensor-parallel size."""
    max_position_embeddings: int = 16_384
    vocab_size: int = 258
    """At least 258: the 256 bytes, ``<bos>`` and ``<eos>``."""
    seed: int = 20_260_216

    def __post_init__(self) -> None:
        if self.num_attention_heads % 2 or self.hidden_size % (2 * self.num_attention_heads) or self.vocab_size < 258:
            raise ValueError(f"num_attention_heads must be even and divide hidden_size / 2, vocab_size >= 258: {self}")


DEEP_SHAPE = TinyModelShape(num_hidden_layers=8, hidden_size=64, intermediate_size=128)
"""For measurements of prefill scheduling: eight thin layers, 41 operators. The default's four layers would make an
operator a far larger part of a prefill than it is in real models, which have 32 layers and more."""


def make_deep_model(layers: int | None = None) -> tuple[Path, TinyModelShape]:
    """The model of ``DEEP_SHAPE``, or of another number of layers, and its shape."""
    shape = DEEP_SHAPE if layers is None else replace(DEEP_SHAPE, num_hidden_layers=layers)
    return make_tiny_model(shape=shape), shape


def default_model_dir() -> Path:
    """Where the generated model is kept between runs: ``$XDG_CACHE_HOME/flowprefill`` or ``~/.cache/flowprefill``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flowprefill"


def make_tiny_model(directory: Path | None = None, shape: TinyModelShape | None = None) -> Path:
    """Make the model unless it is there already, and return its folder.

    The folder's name carries the shape, the seed and the recipe; it appears in one step, so that several processes may
    ask at once. Raises OSError when the folder cannot be written.
    """
    shape = shape or TinyModelShape()
    parent = directory or default_model_dir()
    target = parent / _folder_name(shape)
    if (target / "config.json").is_file():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=".making-"))
    try:
        _write_model(staging, shape)
        staging.chmod(0o755)  # mkdtemp and safetensors make files that only their owner may read
        for file in staging.iterdir():
            file.chmod(0o644)
        try:
            staging.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # nobody else finished it meanwhile
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _folder_name(shape: TinyModelShape) -> str:
    s = shape
    return (
        f"tiny-llama-{s.num_hidden_layers}l-{s.hidden_size}h-{s.intermediate_size}i-{s.num_attention_heads}heads"
        f"-{s.max_position_embeddings}ctx-{s.vocab_size}v-seed{s.seed}-r{RECIPE}"
    )


def _write_model(directory: Path, shape: TinyModelShape) -> None:
    from safetensors.numpy import save_file

    save_file(_weights(shape), directory / "model.safetensors", metadata={"format": "pt"})
    documents = {
        "config.json": _config(shape),
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(shape: TinyModelShape) -> dict[str, Any]:  # a JSON document
    config = {k: v for k, v in asdict(shape).items() if k != "seed"}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": shape.num_attention_heads,
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }


def _weights(shape: TinyModelShape) -> dict[str, np.ndarray]:
    """Arrays by Hugging Face name, float32, ``[out_features, in_features]``."""
    rng = np.random.default_rng(shape.seed)
    hidden, head_dim = shape.hidden_size, shape.hidden_size // shape.num_attention_heads

    def linear(out_features: int, in_features: int, gain: float = 1.0) -> np.ndarray:
        scaled: np.ndarray = rng.standard_normal((out_features, in_features)) * (gain / in_features**0.5)
        return scaled.astype(np.float32)

    weights = {"model.embed_tokens.weight": linear(shape.vocab_size, hidden, 0.2 * hidden**0.5)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        values, output = linear(hidden, hidden), linear(hidden, hidden)
        for first in range(0, hidden, 2 * head_dim):  # the second head of each pair: the same values, subtracted
            pair, other = slice(first, first + head_dim), slice(first + head_dim, first + 2 * head_dim)
            values[other], output[:, other] = values[pair], -output[:, pair]
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": linear(hidden, hidden, 1.5),
            f"{prefix}.self_attn.k_proj.weight": linear(hidden, hidden, 1.5),
            f"{prefix}.self_attn.v_proj.weight": values,
            f"{prefix}.self_attn.o_proj.weight": output,
            f"{prefix}.mlp.gate_proj.weight": linear(shape.intermediate_size, hidden),
            f"{prefix}.mlp.up_proj.weight": linear(shape.intermediate_size, hidden),
            f"{prefix}.mlp.down_proj.weight": linear(hidden, shape.intermediate_size, 0.5),
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    head = linear(shape.vocab_size, hidden, 4.0)
    printable = np.zeros(shape.vocab_size, bool)
    printable[0x20:0x7F] = True
    head[~printable] = 0.0
    return weights | {"model.norm.weight": np.ones(hidden, np.float32), "lm_head.weight": head}


def _tokenizer() -> dict[str, Any]:  # a JSON document
    specials = [(BOS, "<bos>"), (EOS, "<eos>")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": c,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, c in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())} | {c: i for i, c in specials},
            "merges": [],
        },
    }


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others from U+0100 up."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in itself else chr(next(others)) for b in range(256)]
