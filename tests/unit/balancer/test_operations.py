"""A balancer checks the arguments of its calls before anything is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancer
from agentperf_redis.balancer.operations import _rate
from agentperf_redis.errors import InvalidArgument


@pytest.mark.parametrize("value", [0, -1, math.nan, -math.inf, "60", True, 1e10, None])
def test_rate_outside_its_bounds_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="requests_per_minute is"):
        _rate("requests_per_minute", value)


def test_rate_may_be_infinite() -> None:
    assert _rate("requests_per_minute", math.inf) == math.inf


def test_check_times_out_after_two_seconds_or_its_interval(dead_backend: Backend) -> None:
    balancer = LoadBalancer(backend=dead_backend)

    def limit(interval: float, timeout: float | None) -> float:
        return balancer._operations.checking("planner", print, interval, timeout).timeout

    assert [limit(0.5, None), limit(2.0, None), limit(60.0, None), limit(60.0, 30.0)] == [0.5, 2.0, 2.0, 30.0]
    with pytest.raises(InvalidArgument, match=r"^timeout is 1\.0; allowed: seconds from 0\.005 to 0\.5$"):
        limit(0.5, 1.0)
