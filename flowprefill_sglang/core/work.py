"""How much prefill work a request is before anyone has tokenised it.

The body's length is known at once, its tokens only when a worker answers. The ratio between the two is a property of
the traffic (language, tokenizer, templates), so it is learned: an exponentially weighted mean over the answers.
"""

from __future__ import annotations

from typing import Final

INITIAL_BYTES_PER_TOKEN: Final = 4.0
"""English text with a vocabulary of 32,000 to 128,000; wrong for the first few requests at worst."""


class TokenRatio:
    """Bytes of prompt for each token, learned from answers; older answers count less."""

    def __init__(self, bytes_per_token: float = INITIAL_BYTES_PER_TOKEN, weight: float = 0.05) -> None:
        if bytes_per_token <= 0 or not 0 < weight <= 1:
            raise ValueError(f"bytes_per_token {bytes_per_token} and weight {weight} must be positive, weight <= 1")
        self.bytes_per_token = bytes_per_token
        self._weight = weight

    def tokens(self, prompt_bytes: int) -> int:
        """Predicted tokens of a prompt, at least one."""
        return max(1, round(prompt_bytes / self.bytes_per_token))

    def observe(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from one answer. Both lengths count the same prompt; empty ones teach nothing."""
        if prompt_bytes > 0 and prompt_tokens > 0:
            self.bytes_per_token += self._weight * (prompt_bytes / prompt_tokens - self.bytes_per_token)
