"""SGLang's own classes of the model families that are small enough to be served by a CPU in practice."""

from __future__ import annotations

from typing import Any

from sglang.srt.models import llama, qwen2, qwen3, qwen3_moe

EntryClass: list[Any] = [
    *llama.EntryClass,
    qwen2.EntryClass,
    qwen3.EntryClass,
    qwen3_moe.EntryClass,
]
