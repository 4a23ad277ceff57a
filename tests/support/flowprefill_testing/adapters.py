"""LoRA adapters with random weights for the models of the tests, in the files of Hugging Face's PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 4
SIZE = 0.5
"""Standard deviation of their weights: large enough that each adapter gives answers of its own."""


def make_adapter(target: Path, model: Path, seed: int) -> Path:
    """Write an adapter of a Llama's attention layers into ``target`` and return that folder."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    widths = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (config["num_key_value_heads"] * head_dim, hidden),
        "v_proj": (config["num_key_value_heads"] * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
    }
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * SIZE / columns**0.5).astype(np.float32)

    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (out_features, in_features) in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = random(RANK, in_features)
            weights[f"{prefix}.lora_B.weight"] = random(out_features, RANK)
    target.mkdir(parents=True)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(widths),
        "bias": "none",
    }
    (target / "adapter_config.json").write_text(json.dumps(document))
    save_file(weights, target / "adapter_model.safetensors")
    return target
