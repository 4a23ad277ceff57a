"""The plugin inside SGLang's own loader, which logs what a plugin raises and goes on."""

from __future__ import annotations

import pytest

from flowprefill_testing.sglang_process import facts_of, run_script

pytest.importorskip("sglang", reason="the seam needs SGLang")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("StartupError('this SGLang is too old')", "flowprefill: this SGLang is too old"),
        ("KeyError('x')", "flowprefill: the plugin could not be set up: KeyError: 'x'"),
        ("ImportError('gone')", "flowprefill: the plugin could not be set up: ImportError: gone"),
    ],
)
def test_an_error_ends_the_process_with_a_message(error: str, message: str) -> None:
    done = run_script(f"""
        from flowprefill_sglang.errors import StartupError
        from flowprefill_sglang.integration import transfer_backend

        def prepare():
            raise {error}

        transfer_backend.prepare = prepare
        from sglang.srt.plugins import load_plugins

        load_plugins()
        print("still running")
    """)
    assert done.returncode == 1
    assert message in done.stderr
    assert "still running" not in done.stdout


def test_a_process_that_leaves_the_plugin_out_is_told_how_to_get_it() -> None:
    facts = facts_of(
        """
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from flowprefill_sglang.errors import StartupError
        from flowprefill_sglang.integration.plugin import require_loaded

        try:
            require_loaded()
        except StartupError as error:
            facts["error"] = str(error)
        """,
        SGLANG_PLUGINS="flowprefill_cpu",  # the platform's name: SGLang holds both kinds against this list
    )
    assert "SGLANG_PLUGINS='flowprefill_cpu' leaves it out; add 'flowprefill'" in facts["error"]


def test_registering_again_changes_nothing_and_losing_the_hooks_is_noticed() -> None:
    facts = facts_of("""
        import inspect
        import os
        from sglang.srt.plugins import load_plugins
        from sglang.srt.plugins.hook_registry import HookRegistry

        load_plugins()
        from sglang.srt.disaggregation import utils
        from flowprefill_sglang.errors import StartupError
        from flowprefill_sglang.integration import plugin
        from flowprefill_sglang.integration.platform import has_accelerator

        def state():
            hooks = sum(len(hooks) for hooks in HookRegistry._hooks.values())
            return [hooks, id(HookRegistry.apply_hooks), id(utils.get_kv_class)]

        before = state()
        plugin.register()
        HookRegistry.apply_hooks()
        facts["is same"], facts["hooks"] = state() == before, before[0]
        plugin.require_loaded()
        facts["no copy"] = os.environ["SGLANG_EAGER_INPUT_NO_COPY"]
        facts["waits for a GPU's dump"] = os.environ.get("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "1")
        facts["has a GPU"] = has_accelerator()
        utils.get_kv_class = inspect.unwrap(utils.get_kv_class)
        try:
            plugin.require_loaded()
        except StartupError as error:
            facts["removed"] = str(error)
    """)
    assert facts["is same"]
    assert facts["hooks"] >= 1
    assert facts["no copy"] == "1"
    assert facts["waits for a GPU's dump"] == ("1" if facts["has a GPU"] else "0")
    assert "its hooks were removed again" in facts["removed"]
