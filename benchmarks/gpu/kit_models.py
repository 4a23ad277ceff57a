"""Folders of models that have a shape and no weights, for ``--load-format dummy``, with a byte-level tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flowprefill_sglang.workload.tiny_model import BOS, EOS, make_tiny_model

CONTEXT_TOKENS = 163_840
"""Longer than the models' own, so that prompts of 128k fit: nobody reads what dummy weights answer."""
COMMON: dict[str, Any] = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": CONTEXT_TOKENS,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "mlp_bias": False,
    },
    "qwen3-14b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}
TINY = "tiny"
"""The generated model with real weights, for a run without a GPU."""
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def model_folder(name: str, folder: Path, layers: int | None = None) -> Path:
    """The folder of a model of this shape, or of its first layers. KeyError for a name that is not known."""
    tiny = make_tiny_model()
    if name == TINY:
        return tiny
    config = COMMON | SHAPES[name]
    if layers is not None:
        config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    target = folder / f"{name}-{config['num_hidden_layers']}l"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in COPIED:
        shutil.copy(tiny / file, target / file)
    return target
