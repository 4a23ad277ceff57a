"""The scheduler's settings cross from SGLang's HTTP process to its scheduler process, unchanged or not at all."""

import pytest

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.prefill_worker.settings import (
    ENVIRONMENT_VARIABLE,
    SchedulerKind,
    SchedulerSettings,
    publish,
    published,
)


def test_what_is_published_is_read() -> None:
    environment: dict[str, str] = {}
    settings = SchedulerSettings(
        kind=SchedulerKind.STOCK, policy="edf", max_wait_s=1.5, batch_tokens=7, cost_file="/a b/c.json"
    )
    publish(settings, environment)
    assert published(environment) == settings
    publish(SchedulerSettings(), environment)
    assert published(environment) == SchedulerSettings()


def test_a_process_that_no_worker_started_has_none() -> None:
    assert published({}) is None


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", '{"policy": 3}', '{"kind": "other"}', '{"of_a_later_version": 1}', '{"max_wait_s": null}'],
)
def test_what_is_not_understood_is_named(text: str) -> None:
    with pytest.raises(StartupError, match=ENVIRONMENT_VARIABLE):
        published({ENVIRONMENT_VARIABLE: text})


def test_the_defaults_can_work() -> None:
    SchedulerSettings().check()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_wait_s": 0.0}, "max_wait_s"),
        ({"max_suspend_s": -1.0}, "max_suspend_s"),
        ({"max_wait_s": float("nan")}, "max_wait_s"),
        ({"default_objective_s": 0.0}, "default_objective_s"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"slack_fraction": -0.1}, "slack_fraction"),
        ({"slack_fraction": 1.0}, "slack_fraction"),
        ({"slack_fraction": float("nan")}, "slack_fraction"),
        ({"max_blocking_ms": -1.0}, "max_blocking_ms"),
        ({"max_blocking_ms": float("nan")}, "max_blocking_ms"),
        ({"max_tasks": 0}, "max_tasks"),
        ({"activation_fraction": 0.0}, "activation_fraction"),
        ({"activation_fraction": 1.01}, "activation_fraction"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        SchedulerSettings(**values).check()  # type: ignore[arg-type]


def test_the_blocking_target_depends_on_the_device_unless_it_is_given() -> None:
    assert SchedulerSettings().blocking_target_s("cuda") == 0.002
    assert SchedulerSettings().blocking_target_s("cpu") == 0
    assert SchedulerSettings(max_blocking_ms=5.0).blocking_target_s("cpu") == 0.005
    assert SchedulerSettings(max_blocking_ms=0.0).blocking_target_s("cuda") == 0.002


def test_a_slice_takes_the_half_of_an_accelerators_target_that_what_is_in_flight_leaves() -> None:
    assert SchedulerSettings().slice_target_s("cuda") == 0.001
    assert SchedulerSettings().slice_target_s("cpu") == 0
    assert SchedulerSettings(max_blocking_ms=5.0).slice_target_s("cpu") == 0.005
    assert SchedulerSettings(max_blocking_ms=0.0).slice_target_s("cuda") == 0
