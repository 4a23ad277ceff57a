"""Scheduling configurations by name: ``POLICY[@GRANULARITY]``.

::

    feasible edf sedf srpt                     the product's scheduler, preemption at operator boundaries
    POLICY@operator POLICY@layer POLICY@whole  the same where a forward can stop at operators, at layers, not at all
    POLICY@chunkN                              the same in chunks of N tokens, decisions between chunks only
    fcfs fcfs@whole                            SGLang's own scheduler, whole prompts, batches of up to 16,384 tokens
    fcfs@chunkN                                SGLang's own scheduler in chunks of N tokens, one prompt at a time
    fcfs@operator fcfs@layer                   the product's scheduler with its policy ``fcfs``
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from flowprefill_sglang.core.policies import POLICIES
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim.boundaries import Granularity

STOCK_BATCH_TOKENS: Final = 16_384
"""SGLang 0.5.23's default ``--max-prefill-tokens``."""
GRAMMAR: Final = "POLICY[@operator|@layer|@chunkN|@whole]"
_CHUNK = re.compile(r"chunk([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Who decides, and how finely it is obeyed."""

    name: str
    """As the user wrote it."""
    policy: str
    """In ``core.policies.POLICIES``."""
    granularity: Granularity
    chunk_tokens: int | None = None
    """A prompt's share in one forward at most; None: whole prompts."""

    @property
    def is_stock(self) -> bool:
        """Whether it is SGLang's scheduler and not ours."""
        return self.policy == "fcfs" and self.granularity is Granularity.WHOLE


def parse(text: str) -> Configuration:
    """The configuration of a name. Raises BadInput with what was expected."""
    policy, at, rest = text.partition("@")
    if policy not in POLICIES:
        raise BadInput(f"{text!r}: expected {GRAMMAR} with one of {', '.join(sorted(POLICIES))}")
    if not at:
        granularity = Granularity.WHOLE if policy == "fcfs" else Granularity.OPERATOR
        return Configuration(name=text, policy=policy, granularity=granularity)
    if match := _CHUNK.fullmatch(rest):
        tokens = int(match[1])
        return Configuration(name=text, policy=policy, granularity=Granularity.WHOLE, chunk_tokens=tokens)
    if rest not in list(Granularity):
        raise BadInput(f"{text!r}: expected {GRAMMAR}, with N the tokens of a chunk")
    return Configuration(name=text, policy=policy, granularity=Granularity(rest))
