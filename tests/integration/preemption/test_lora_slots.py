from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.preemption.lora_slots import hold_adapters
from flowprefill_testing.sglang_process import facts_of


class Manager:
    """SGLang's LoRAManager as far as slots go: the least recently used adapter that a batch does not need gives way."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.loaded: OrderedDict[str | None, None] = OrderedDict()

    def validate_lora_batch(self, lora_ids: set[str | None]) -> bool:
        return len(lora_ids) <= self.slots

    def fetch_new_loras(self, new_loras: set[str | None], running_loras: set[str | None] = frozenset()) -> None:
        needed = new_loras | running_loras
        assert len(needed) <= self.slots
        for adapter in sorted(needed, key=str):
            if adapter not in self.loaded and len(self.loaded) == self.slots:
                del self.loaded[next(a for a in self.loaded if a not in needed)]
            self.loaded[adapter] = None


def test_adapters_of_forwards_under_way_are_not_overwritten() -> None:
    manager, held = Manager(2), set[str | None]()
    hold_adapters(manager, lambda: held)
    manager.fetch_new_loras({"a"})
    held.add("a")
    manager.fetch_new_loras({"b"})
    manager.fetch_new_loras({"c"})
    assert set(manager.loaded) == {"a", "c"}
    held.clear()
    manager.fetch_new_loras(new_loras={"d", "e"})
    assert set(manager.loaded) == {"d", "e"}


def test_a_request_without_a_slot_beside_the_held_is_not_admitted() -> None:
    manager, held = Manager(2), {"a", "b"}
    hold_adapters(manager, lambda: held)
    assert not manager.validate_lora_batch({"c"})
    assert manager.validate_lora_batch({"a"})
    held.remove("b")
    assert manager.validate_lora_batch(lora_ids={"c"})


def test_another_manager_stops_the_start() -> None:
    with pytest.raises(StartupError, match="validate_lora_batch"):
        hold_adapters(SimpleNamespace(), set)


def test_sglang_admits_and_loads_through_these_two() -> None:
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of("""
        from sglang.srt.plugins import load_plugins

        load_plugins()
        import inspect
        from sglang.srt.lora.lora_manager import LoRAManager
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        for name in ("validate_lora_batch", "fetch_new_loras"):
            facts[name] = list(inspect.signature(getattr(LoRAManager, name)).parameters)[1]
        facts["admission"] = "lora_manager.validate_lora_batch" in inspect.getsource(Scheduler.can_schedule_lora_req)
        facts["loading"] = "lora_manager.fetch_new_loras(" in inspect.getsource(ForwardBatch.init_new)
    """)
    assert facts == {
        "validate_lora_batch": "lora_ids",
        "fetch_new_loras": "new_loras",
        "admission": True,
        "loading": True,
    }
