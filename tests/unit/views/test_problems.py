"""Tests of the problems that `agentperf status` shows first."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.balancer.model import (
    AgentInstance,
    InstanceState,
    InstanceStatus,
    LoadBalancingStrategy,
    PoolStatus,
)
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.views.problems import Problem, problems


def pool(*states: InstanceState, **facts: Any) -> PoolStatus:
    instances = tuple(
        InstanceStatus(AgentInstance(f"i{number}", "coder"), 0, 0, 0, 0, 0, state=state)
        for number, state in enumerate(states)
    )
    return PoolStatus(
        "coder", LoadBalancingStrategy.LEAST_LOADED, instances, **{"waiting": 0, "granted": 0, "overdue": 0} | facts
    )


@pytest.mark.parametrize(("failures", "level"), [(1, "note"), (9, "note"), (10, "bad"), (100, "bad")])
def test_failures_are_bad_from_ten_percent(failures: int, level: str) -> None:
    agent = PerformanceMetrics("a", 100, 100 - failures, failures, error_types={"KeyError": 1})
    (found,) = problems([agent], [], [])
    text = f"{failures} of 100 executions failed ({failures / 100:.1%}), 1 with KeyError"
    assert found == Problem(level, "agent", "a", text)


def test_healthy_services_have_no_problem() -> None:
    up = pool(InstanceState.UP, InstanceState.WARMING, InstanceState.HALF_OPEN, InstanceState.DRAINING)
    assert problems([PerformanceMetrics("a", 5, 5)], [], [up]) == []


@pytest.mark.parametrize(
    ("states", "facts", "level", "text"),
    [
        (("up", "ejected"), {}, "note", "1 of 2 instances takes no work: i1 ejected"),
        (
            ("up", "down", "heartbeat_missed"),
            {},
            "note",
            "2 of 3 instances take no work: i1 down, i2 heartbeat missed",
        ),
        (("unhealthy", "draining"), {}, "bad", "no instance takes work"),
        (("up",), {"waiting": 1}, "note", "1 caller waits for an instance"),
        (("up",), {"waiting": 4}, "note", "4 callers wait for an instance"),
        (("up",), {"panic_for": 12.4}, "bad", "in panic mode for 12 s: unhealthy instances get work too"),
    ],
)
def test_pools_without_capacity_are_problems(
    states: tuple[str, ...], facts: dict[str, Any], level: str, text: str
) -> None:
    (found,) = problems([], [], [pool(*map(InstanceState, states), **facts)])
    assert (found.level, found.subject, found.name, found.text) == (level, "pool", "coder", text)


def test_bad_problems_come_first() -> None:
    mild, bad = PerformanceMetrics("a", 100, 99, 1), PerformanceMetrics("b", 1, 0, 1)
    assert [each.name for each in problems([mild, bad], [], [])] == ["b", "a"]
