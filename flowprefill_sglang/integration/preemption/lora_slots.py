"""LoRA adapters of suspended forwards stay where they are.

SGLang 0.5.23 keeps the adapters in a few slots on the device and, for a new batch, overwrites those that the batch does
not need. A suspended forward has the numbers of its slots in its batch metadata, so an overwritten slot would give it
another adapter's weights, without an error. Here the adapters that are held count as needed by every new batch: they
are not overwritten, and SGLang does not admit a request whose adapter finds no slot beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import sglang_version


def hold_adapters(lora_manager: Any, held: Callable[[], Collection[str | None]]) -> None:
    """Guard the slots of one SGLang ``LoRAManager``. ``held``: adapters (None: the base model) of all forwards that
    have begun and not ended; called whenever a batch is admitted or begun.

    Raises StartupError when the manager is not as expected.
    """
    for name, first_argument in (("validate_lora_batch", "lora_ids"), ("fetch_new_loras", "new_loras")):
        function = getattr(lora_manager, name, None)
        if function is None:
            raise StartupError(f"SGLang {sglang_version()}'s LoRAManager has no {name}: adapters cannot be held")
        setattr(lora_manager, name, _with_held(function, first_argument, held))


def _with_held(
    function: Callable[..., Any], first_argument: str, held: Callable[[], Collection[str | None]]
) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # SGLang's arguments and result
        wanted = kwargs.pop(first_argument) if first_argument in kwargs else args[0]
        return function(set(wanted) | set(held()), *args[1:], **kwargs)

    return guarded
