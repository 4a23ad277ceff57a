"""The hook list against SGLang's real registry: what does not land is named, and ends the process."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("sglang", reason="the seam needs SGLang")

PRELUDE = """
    import sys, types
    from flowprefill_sglang.integration.hooks import Hook, HookKind, missing, register, verify_when_applied
    from sglang.srt.plugins.hook_registry import HookRegistry

    victim = types.ModuleType("victim")
    def double(x): return 2 * x
    class Box:
        def get(self): return "inside"
        @staticmethod
        def static(): return "static"
        @classmethod
        def of(cls): return "class"
    victim.double, victim.Box = double, Box
    sys.modules["victim"] = victim
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: SGLang's registry is a global that cannot be undone."""
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)


def test_hooks_of_every_kind_land_and_are_seen() -> None:
    done = run("""
        hooks = [
            Hook(target="victim.double", kind=HookKind.AROUND, function=lambda f, x: f(x) + 1, why="-"),
            Hook(target="victim.Box.get", kind=HookKind.AFTER, function=lambda result, self: result + "!", why="-"),
            Hook(target="victim.Box.static", kind=HookKind.REPLACE, function=lambda: "replaced", why="-"),
            Hook(target="victim.Box.of", kind=HookKind.BEFORE, function=lambda cls: None, why="-"),
        ]
        register(hooks)
        assert len(missing(hooks)) == 4
        verify_when_applied(hooks)
        HookRegistry.apply_hooks()
        assert missing(hooks) == []
        print(victim.double(1), victim.Box().get(), victim.Box.static(), victim.Box.of())
    """)
    assert done.stderr == ""
    assert done.stdout.split() == ["3", "inside!", "replaced", "class"]


@pytest.mark.parametrize("target", ["victim.gone", "victim.Box.gone", "no_such_module.function"])
def test_a_target_that_is_gone_stops_the_process_and_is_named(target: str) -> None:
    done = run(f"""
        hooks = [Hook(target="{target}", kind=HookKind.AROUND, function=print, why="nothing would be printed")]
        register(hooks)
        verify_when_applied(hooks)
        HookRegistry.apply_hooks()
        print("still running")
    """)
    assert done.returncode == 1
    assert "still running" not in done.stdout
    assert f"{target}: without this hook, nothing would be printed" in done.stderr
    assert "SGLang 0.5.23" in done.stderr


def test_another_plugins_hook_on_the_same_target_does_not_hide_ours() -> None:
    done = run("""
        ours = Hook(target="victim.double", kind=HookKind.AROUND, function=lambda f, x: f(x) + 1, why="-")
        theirs = Hook(target="victim.double", kind=HookKind.AFTER, function=lambda result, x: result * 10, why="-")
        register([ours, theirs])
        HookRegistry.apply_hooks()
        assert missing([ours]) == []
        print(victim.double(1))
    """)
    assert done.stdout.strip() == "30", done.stderr


def test_a_failed_check_stops_the_process() -> None:
    done = run("""
        from flowprefill_sglang.errors import StartupError
        def check(): raise StartupError("the enum has no such member")
        verify_when_applied([], [check])
        HookRegistry.apply_hooks()
        print("still running")
    """)
    assert done.returncode == 1
    assert "the enum has no such member" in done.stderr
