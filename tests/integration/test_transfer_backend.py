"""``--disaggregation-transfer-backend zmq`` in SGLang's Enum, choices and class lookup, and what happens without it."""

from __future__ import annotations

import copy
import pickle
from enum import Enum
from typing import Any

import pytest

from flowprefill_sglang.integration.transfer_backend import add_member
from flowprefill_testing.sglang_process import facts_of


class Fruit(Enum):
    APPLE = "apple"


def test_a_member_that_was_added_is_like_the_others() -> None:
    add_member(Fruit, "PEAR", "pear")
    pear = Fruit("pear")
    assert pear is Fruit["PEAR"] is Fruit.PEAR
    assert list(Fruit) == [Fruit.APPLE, pear]
    assert (pear.name, pear.value, repr(pear), len(Fruit)) == ("PEAR", "pear", "<Fruit.PEAR: 'pear'>", 2)
    assert pear in Fruit
    assert {pear: 1}[Fruit("pear")] == 1
    assert pickle.loads(pickle.dumps(pear)) is copy.deepcopy(pear) is pear
    with pytest.raises(ValueError, match="plum"):
        Fruit("plum")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """One process for all: SGLang as it is, and then with one thing missing after the other."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    return facts_of("""
        import inspect
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.arg_groups import choices
        from sglang.srt.disaggregation import utils
        from sglang.srt.disaggregation.utils import KVClassType, TransferBackend
        from flowprefill_sglang.errors import StartupError
        from flowprefill_sglang.integration import transfer_backend

        member = TransferBackend("zmq")
        facts["member"] = [member is TransferBackend.ZMQ is TransferBackend["ZMQ"], list(TransferBackend)[-1] is member]
        facts["choices"] = choices.DISAGG_TRANSFER_BACKEND_CHOICES.count("zmq")
        transfer_backend.prepare()
        facts["prepared again"] = [
            choices.DISAGG_TRANSFER_BACKEND_CHOICES.count("zmq"), [m.value for m in TransferBackend].count("zmq")
        ]
        facts["classes"] = {
            kind.value: utils.get_kv_class(member, kind).__module__ for kind in KVClassType
        }
        facts["others"] = utils.get_kv_class(TransferBackend("fake"), KVClassType.SENDER).__module__
        import sglang.srt.disaggregation.decode, sglang.srt.disaggregation.prefill, sglang.srt.managers.disagg_service
        users = [name for name, m in sys.modules.items() if name.startswith("sglang.") and hasattr(m, "get_kv_class")]
        facts["users"] = sorted(users)
        facts["stale"] = [name for name in users if sys.modules[name].get_kv_class is not utils.get_kv_class]

        def complaint(call):
            try:
                call()
            except StartupError as error:
                return str(error)
            return None

        facts["whole"] = complaint(transfer_backend.check)

        choices.DISAGG_TRANSFER_BACKEND_CHOICES.remove("zmq")
        facts["no choice"] = complaint(transfer_backend.check)
        choices.DISAGG_TRANSFER_BACKEND_CHOICES.append("zmq")

        del TransferBackend._value2member_map_["zmq"]
        TransferBackend._member_map_.pop("ZMQ")
        facts["no member"] = complaint(transfer_backend.check)
        TransferBackend._value2member_map_["zmq"] = TransferBackend._member_map_["ZMQ"] = member

        hooked = utils.get_kv_class
        utils.get_kv_class = lambda backend, kind: object
        facts["no classes"] = complaint(transfer_backend.check)
        utils.get_kv_class = inspect.unwrap(hooked)
        facts["no hook"] = complaint(transfer_backend.check)
        utils.get_kv_class = hooked
        sglang.srt.disaggregation.decode.get_kv_class = inspect.unwrap(hooked)
        facts["a stale copy"] = complaint(transfer_backend.check)
        sglang.srt.disaggregation.decode.get_kv_class = hooked

        del choices.add_disagg_transfer_backend_choices
        facts["no way to add"] = complaint(transfer_backend.prepare)
        facts["whole again"] = complaint(transfer_backend.check)
    """)


def test_the_member_is_found_by_value_by_name_and_in_iteration(facts: dict[str, Any]) -> None:
    assert facts["member"] == [True, True]


def test_the_flag_takes_the_value_and_preparing_twice_adds_nothing(facts: dict[str, Any]) -> None:
    assert facts["choices"] == 1
    assert facts["prepared again"] == [1, 1]


def test_the_classes_are_ours_and_those_of_other_backends_are_not(facts: dict[str, Any]) -> None:
    assert facts["classes"] == {
        "kvargs": "sglang.srt.disaggregation.base.conn",
        "manager": "flowprefill_sglang.kv.manager",
        "sender": "flowprefill_sglang.kv.endpoints",
        "receiver": "flowprefill_sglang.kv.endpoints",
        "bootstrap_server": "flowprefill_sglang.kv.endpoints",
    }
    assert facts["others"].startswith("sglang.")


def test_every_module_that_imported_the_lookup_has_the_hooked_one(facts: dict[str, Any]) -> None:
    assert {
        "sglang.srt.disaggregation.prefill",
        "sglang.srt.disaggregation.decode",
        "sglang.srt.managers.disagg_service",
    } <= set(facts["users"])
    assert facts["stale"] == []


def test_the_check_passes_where_nothing_is_missing(facts: dict[str, Any]) -> None:
    assert (facts["whole"], facts["whole again"]) == (None, None)


@pytest.mark.parametrize(
    ("what", "target"),
    [
        ("no choice", "the choices of --disaggregation-transfer-backend"),
        ("no member", "disaggregation.utils.TransferBackend"),
        ("no classes", "sglang.srt.disaggregation.utils.get_kv_class (manager)"),
        ("no hook", "sglang.srt.disaggregation.utils.get_kv_class (manager)"),
        ("a stale copy", "sglang.srt.disaggregation.decode.get_kv_class"),
        ("no way to add", "add_disagg_transfer_backend_choices"),
    ],
)
def test_what_is_missing_is_named_with_sglangs_version(facts: dict[str, Any], what: str, target: str) -> None:
    assert target in facts[what]
    assert "SGLang 0.5.23 does not take the zmq KV transfer backend" in facts[what]
    assert "install sglang==0.5.23" in facts[what]
