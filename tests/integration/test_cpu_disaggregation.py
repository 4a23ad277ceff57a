"""SGLang's prefill/decode disaggregation without an accelerator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill_sglang.integration.cpu_disaggregation import send_cached_prefix_without_event, use_plain_indices
from flowprefill_sglang.integration.platform import has_accelerator
from flowprefill_testing.sglang_process import facts_of


@pytest.mark.parametrize(("kind", "expected"), [("sender", False), ("receiver", True)])
def test_senders_get_page_numbers_as_arrays(kind: str, expected: bool) -> None:
    made = type("Made", (), {"supports_host_tensor_indices": True})
    use_plain_indices(made, SimpleNamespace(value="mooncake"), SimpleNamespace(value=kind))
    assert made.supports_host_tensor_indices is expected


def test_no_class_is_no_error() -> None:
    use_plain_indices(None, SimpleNamespace(value="fake"), SimpleNamespace(value="sender"))


@pytest.mark.parametrize("is_overlapping", [True, False])
def test_overlap_is_off_only_while_the_prefix_is_sent(is_overlapping: bool) -> None:
    scheduler, seen = SimpleNamespace(enable_overlap=is_overlapping), []
    send_cached_prefix_without_event(
        lambda s, *args, **kw: seen.append((s.enable_overlap, args, kw)), scheduler, 1, a=2
    )
    assert seen == [(False, (1,), {"a": 2})]
    assert scheduler.enable_overlap is is_overlapping


def test_overlap_is_restored_after_an_error() -> None:
    scheduler = SimpleNamespace(enable_overlap=True)
    with pytest.raises(ZeroDivisionError):
        send_cached_prefix_without_event(lambda _: 1 / 0, scheduler)
    assert scheduler.enable_overlap


# ---- as SGLang resolves its arguments ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    if has_accelerator():
        pytest.skip("nothing is changed where there is an accelerator")
    return facts_of("""
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.arg_groups import pd_disaggregation_hook
        from sglang.srt.arg_groups.overrides import resolving_view
        from sglang.srt.server_args import ServerArgs

        def backup(**given):
            server_args = ServerArgs(model_path="dummy", disaggregation_transfer_backend="zmq", **given)
            try:
                pd_disaggregation_hook.handle_pd_disaggregation(server_args)
            except ValueError as error:
                return f"ValueError: {error}"
            return resolving_view(server_args).disaggregation_decode_retraction_backup

        facts["decode"] = backup(disaggregation_mode="decode")
        facts["given"] = backup(disaggregation_mode="decode", disaggregation_decode_retraction_backup="host_pool")
        facts["neither"] = backup()
        facts["checksum"] = backup(disaggregation_mode="prefill", disaggregation_enable_kv_checksum=True)

        from flowprefill_sglang.errors import StartupError
        from flowprefill_sglang.integration import cpu_disaggregation
        import sglang.srt.server_args

        class Older:
            disaggregation_enable_kv_checksum = False

        sglang.srt.server_args.ServerArgs = Older
        try:
            cpu_disaggregation.check()
        except StartupError as error:
            facts["older"] = str(error)
    """)


def test_retracted_requests_are_kept_in_ordinary_tensors(resolved: dict[str, Any]) -> None:
    assert resolved["decode"] == "cpu_tensor"


def test_the_users_choice_and_ordinary_servers_are_left_alone(resolved: dict[str, Any]) -> None:
    assert (resolved["given"], resolved["neither"]) == ("host_pool", None)


def test_the_checksum_that_needs_a_gpu_is_refused(resolved: dict[str, Any]) -> None:
    assert resolved["checksum"].startswith("ValueError: --disaggregation-enable-kv-checksum computes on a GPU")


def test_an_sglang_without_the_arguments_is_named(resolved: dict[str, Any]) -> None:
    assert "SGLang 0.5.23 has no ServerArgs.disaggregation_decode_retraction_backup" in resolved["older"]
