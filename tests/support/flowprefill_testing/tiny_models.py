"""Models of several architectures with random weights, small enough to run thousands of forwards in a test.

Only what SGLang reads: ``config.json`` and ``model.safetensors`` (float32). They have no tokenizer: serve them with
``--skip-tokenizer-init``. Weights are scaled so that activations keep their size through the layers, or a wrong value
could vanish in rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 97
LAYERS = 2
HIDDEN = 32
INTERMEDIATE = 48
EXPERTS = 4
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 16

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def make_model(directory: Path, architecture: str, seed: int = 0) -> Path:
    """Write the model into ``directory``/``architecture`` and return that folder."""
    target = directory / architecture
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(_config(architecture)))
    save_file(_weights(architecture, seed), target / "model.safetensors", metadata={"format": "pt"})
    return target


def _config(architecture: str) -> dict[str, Any]:
    config = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    if architecture == "qwen2":
        config |= {"use_sliding_window": False}
    if architecture == "qwen3_moe":
        config |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": INTERMEDIATE,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _weights(architecture: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def linear(out_features: int, in_features: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((out_features, in_features)) * gain / in_features**0.5).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": linear(VOCABULARY, HIDDEN, HIDDEN**0.5),
        "model.norm.weight": norm(HIDDEN),
        "lm_head.weight": linear(VOCABULARY, HIDDEN, 2.0),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = linear(heads * HEAD_DIM, HIDDEN, 1.5)
            if architecture == "qwen2":
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = linear(heads * HEAD_DIM, 1, 0.1)[:, 0]
            if architecture.startswith("qwen3") and name != "v":
                weights[f"{prefix}.self_attn.{name}_norm.weight"] = norm(HEAD_DIM)
        weights |= {
            f"{prefix}.self_attn.o_proj.weight": linear(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.input_layernorm.weight": norm(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": norm(HIDDEN),
        }
        weights |= _mlp(f"{prefix}.mlp", architecture, linear)
    return weights


def _mlp(prefix: str, architecture: str, linear: Any) -> dict[str, np.ndarray]:
    if architecture != "qwen3_moe":
        return _dense(prefix, linear)
    weights = {f"{prefix}.gate.weight": linear(EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        weights |= _dense(f"{prefix}.experts.{expert}", linear)
    return weights


def _dense(prefix: str, linear: Any) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.gate_proj.weight": linear(INTERMEDIATE, HIDDEN),
        f"{prefix}.up_proj.weight": linear(INTERMEDIATE, HIDDEN),
        f"{prefix}.down_proj.weight": linear(HIDDEN, INTERMEDIATE),
    }
