from __future__ import annotations

import time

import pytest

from agentperf_redis.views.timeline import WINDOWS, step_choices


@pytest.mark.parametrize(
    ("window", "step"),
    [("5m", 10), ("10m", 10), ("15m", 60), ("1h", 60), ("2h", 120), ("3h", 3600), ("24h", 3600), ("7d", 14_400)],
)
def test_step_is_the_narrowest_that_is_kept(window: str, step: int) -> None:
    assert step_choices(window, None, 60)[0] == step


@pytest.mark.parametrize("window", WINDOWS)
def test_offered_windows_have_detailed_charts(window: str) -> None:
    from agentperf_redis.windows import window_seconds

    assert 24 <= window_seconds(window) / step_choices(window, None, 60)[0] <= 60


def test_steps_of_a_past_window_are_wider() -> None:
    assert step_choices("10m", time.time() - 3600, 60)[0] == 60
    assert step_choices("10m", time.time() - 30 * 86_400, 60) == []


def test_window_shorter_than_a_step_has_none() -> None:
    assert step_choices(5.0, None, 60) == []
