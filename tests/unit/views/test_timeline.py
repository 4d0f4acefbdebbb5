"""The steps of a chart are few and easy to read, and their slices are still kept."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.views.timeline import CHART_STEPS, SPARKLINE_STEPS, WINDOWS, step_choices, steps_read
from agentperf_redis.windows import asked_steps, window_seconds


@pytest.mark.parametrize(
    ("window", "most", "expected"),
    [
        ("5m", 60, 10),
        ("10m", 60, 10),
        ("10m", 30, 20),
        ("15m", 60, 60),
        ("1h", 60, 60),
        ("2h", 30, 300),
        ("24h", 60, 3600),
        ("7d", 60, 14_400),
        ("30d", 60, 86_400),
        (10, 60, 10),
    ],
)
def test_best_step_is_first(window: str | float, most: int, expected: int) -> None:
    assert step_choices(window, None, most)[0] == expected


def test_steps_of_the_past_are_those_that_are_kept() -> None:
    now = time.time()
    assert step_choices("5m", now - 300, 60)[0] == 10
    assert step_choices("5m", now - 900, 60)[0] == 60
    assert step_choices("6h", now - 86_400, 60)[0] == 3600


@given(st.floats(10, 90 * 86_400), st.sampled_from([CHART_STEPS, SPARKLINE_STEPS]))
def test_every_choice_is_a_valid_step(window: float, most: int) -> None:
    choices = step_choices(window, None, most)
    assert choices == sorted(choices)
    for step in choices:
        asked_steps(window, step, None)
        assert window <= most * step or len(choices) == 1


def test_charts_of_offered_windows_keep_their_steps() -> None:
    """The first step may begin a whole step before the window. Even then, the slices of this step are still kept."""
    for window in WINDOWS:
        for most in (CHART_STEPS, SPARKLINE_STEPS):
            step = step_choices(window, None, most)[0]
            width = next((width for width in (86_400, 3600, 60, 10) if step % width == 0), 10)
            kept = {10: 900, 60: 10_800, 3600: 8 * 86_400, 86_400: 90 * 86_400}[width]
            assert window_seconds(window) + step <= kept


def test_offered_windows_have_enough_steps() -> None:
    for window in WINDOWS:
        for most in (CHART_STEPS, SPARKLINE_STEPS):
            assert 12 <= window_seconds(window) / step_choices(window, None, most)[0] <= most


def driven(asked: list[int], refused: tuple[int, ...], argument: str = "step") -> object:
    def read(step: int) -> Flow[str]:
        asked.append(step)
        if step in refused:
            raise InvalidArgument(argument, step, "another one")
        return f"steps of {step}"
        yield

    flow = steps_read(read, "none", "15m", None, 15)
    try:
        next(flow)
    except StopIteration as done:
        return done.value
    raise AssertionError("the flow has a step")


def test_refused_steps_are_followed_by_wider_ones() -> None:
    asked: list[int] = []
    assert driven(asked, (60, 120)) == "steps of 300"
    assert asked == [60, 120, 300]


def test_window_without_slices_has_no_steps() -> None:
    assert driven([], (60, 120, 300, 600, 900)) == "none"


def test_other_refusals_are_raised() -> None:
    with pytest.raises(InvalidArgument, match="window"):
        driven([], (60,), "window")
