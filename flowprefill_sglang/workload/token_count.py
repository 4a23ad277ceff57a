"""Counts tokens of texts with a model's own tokenizer.

``tokenizers`` comes with SGLang and is not among our own requirements: imported only when a tokenizer is given.
"""

from __future__ import annotations

from pathlib import Path

from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.workload.formats.conversations import TokenCounter


def token_counter(path: Path) -> TokenCounter:
    """Counts with the ``tokenizer.json`` at ``path``, a file or a model's folder.

    Raises BadInput for a file that is none, StartupError without the package ``tokenizers``.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise StartupError("--tokenizer needs the package tokenizers, which comes with SGLang") from error
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what the Rust library raises has no narrower type
        raise BadInput(f"--tokenizer: {file} cannot be read as a tokenizer: {error}") from error
    return lambda text: len(tokenizer.encode(text).ids)
