"""Greedy output of the generated model depends on all of its prompt, and not on how the work was cut.

A short Llama forward in torch, independent of SGLang and transformers, so that it also says what the files mean.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from flowprefill_sglang.workload.tiny_model import BOS, TinyModelShape, make_tiny_model

SHAPE = TinyModelShape()
PROMPT_CHARS, ANSWER_TOKENS = 4_000, 16


class Llama:
    """One sequence, with a KV cache."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from safetensors.torch import load_file

        self.weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
        self.head_dim = SHAPE.hidden_size // SHAPE.num_attention_heads
        inverse = 100.0 ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angles = torch.outer(torch.arange(SHAPE.max_position_embeddings, dtype=torch.float64), inverse).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """``x``: [heads, tokens, head_dim]."""
        low, high = x.chunk(2, dim=-1)
        rows = slice(start, start + x.shape[1])
        return x * self.cos[rows] + torch.cat([-high, low], dim=-1) * self.sin[rows]

    def forward(self, ids: list[int], cache: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Logits after the last of ``ids``; ``cache`` holds the keys and values of everything before, by layer."""
        weights, hidden = self.weights, SHAPE.hidden_size
        x = weights["model.embed_tokens.weight"][ids]
        start = cache[0][0].shape[1] if cache else 0
        mask = torch.arange(start + len(ids)) <= torch.arange(start, start + len(ids))[:, None]
        for layer in range(SHAPE.num_hidden_layers):
            p = f"model.layers.{layer}"
            h = rms_norm(x, (hidden,), weights[f"{p}.input_layernorm.weight"], 1e-5)
            q, k, v = (
                (h @ weights[f"{p}.self_attn.{name}_proj.weight"].T).view(len(ids), -1, self.head_dim).transpose(0, 1)
                for name in "qkv"
            )
            q, k = self.rotate(q, start), self.rotate(k, start)
            if start:
                k, v = torch.cat([cache[layer][0], k], dim=1), torch.cat([cache[layer][1], v], dim=1)
            cache[layer] = k, v
            attended = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).reshape(len(ids), hidden)
            x = x + attended @ weights[f"{p}.self_attn.o_proj.weight"].T
            h = rms_norm(x, (hidden,), weights[f"{p}.post_attention_layernorm.weight"], 1e-5)
            gate, up = h @ weights[f"{p}.mlp.gate_proj.weight"].T, h @ weights[f"{p}.mlp.up_proj.weight"].T
            x = x + (silu(gate) * up) @ weights[f"{p}.mlp.down_proj.weight"].T
        return rms_norm(x[-1], (hidden,), weights["model.norm.weight"], 1e-5) @ weights["lm_head.weight"].T

    @torch.no_grad()
    def answer(self, prompt: str, chunk_tokens: int = 10**9) -> tuple[str, float]:
        """Greedy answer, and the smallest gap between the two best logits on the way."""
        ids, cache, smallest = [BOS, *prompt.encode()], {}, float("inf")
        for first in range(0, len(ids), chunk_tokens):
            logits = self.forward(ids[first : first + chunk_tokens], cache)
        answer: list[int] = []
        while True:
            best, second = logits.topk(2).values.tolist()
            smallest = min(smallest, best - second)
            answer.append(int(logits.argmax()))
            if len(answer) == ANSWER_TOKENS:
                return bytes(answer).decode("ascii"), smallest
            logits = self.forward([answer[-1]], cache)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(make_tiny_model(tmp_path_factory.mktemp("model")), torch.float32)


def letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=count))


def test_a_changed_twentieth_anywhere_changes_the_answer(llama: Llama) -> None:
    rng = random.Random(1)
    prompt = letters(rng, PROMPT_CHARS)
    original, _ = llama.answer(prompt)
    changed = PROMPT_CHARS // 20
    same = []
    for start in range(0, PROMPT_CHARS - 2 * changed, 9 * changed // 4):
        other = prompt[:start] + letters(rng, changed) + prompt[start + changed :]
        if llama.answer(other)[0] == original:
            same.append(start)
    assert same == []


def test_only_the_end_in_common_gives_different_answers(llama: Llama) -> None:
    rng = random.Random(2)
    end = letters(rng, 50)
    answers = {llama.answer(letters(rng, 1_000) + end)[0] for _ in range(8)}
    assert len(answers) == 8


def test_answers_are_no_loops(llama: Llama) -> None:
    rng = random.Random(3)
    for _ in range(4):
        answer, _ = llama.answer(letters(rng, 500))
        assert len(set(answer)) >= 6, answer


def test_chunks_and_precision_change_nothing(llama: Llama, tmp_path: Path) -> None:
    exact = Llama(make_tiny_model(tmp_path), torch.float64)
    rng = random.Random(4)
    for length in (1, 63, 64, 700, 2_000):
        prompt = letters(rng, length)
        answer, gap = exact.answer(prompt)
        assert gap > 1e-4, "choose another prompt: this one says nothing"
        assert llama.answer(prompt)[0] == answer
        assert llama.answer(prompt, chunk_tokens=301)[0] == answer
