from __future__ import annotations

from pathlib import Path

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_sglang.workload.token_count import token_counter

pytest.importorskip("tokenizers")


def test_the_tiny_models_tokenizer_counts_bytes_and_bos(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    assert token_counter(model)("abcd") == 5
    assert token_counter(model / "tokenizer.json")("ä") == 3


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--tokenizer: .* cannot be read as a tokenizer"):
        token_counter(tmp_path)
