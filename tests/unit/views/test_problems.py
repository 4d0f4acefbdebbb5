"""The problems that screens and `agentperf status` show first."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.alerts.model import AlertState, AlertStatus
from agentperf_redis.balancer.model import (
    AgentInstance,
    InstanceState,
    InstanceStatus,
    LoadBalancingStrategy,
    PoolStatus,
)
from agentperf_redis.cache.model import CacheStats, Policy, Settings, TierStats
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


def alert(state: AlertState) -> AlertStatus:
    return AlertStatus("slow", "planner", "agents", "page", state, 0.0, 3.0, 3.0, 3.0, 0.0, "p95 > 2s", None)


def test_firing_alerts_come_first() -> None:
    bad = PerformanceMetrics("b", 1, 0, 1)
    first, second = problems([bad], [], [], [alert(AlertState.FIRING), alert(AlertState.PENDING)])
    assert first == Problem("bad", "alert", "slow", "planner: p95 > 2s holds", "planner", "agent")
    assert second.subject == "agent"


@pytest.mark.parametrize(
    ("hits", "misses", "corrupt", "texts"),
    [
        (199, 801, 0, ["only 19.9% of 1000 reads found a value"]),
        (200, 800, 0, []),
        (0, 999, 0, []),
        (5, 5, 1, ["1 read found a damaged entry"]),
    ],
)
def test_useless_and_damaged_caches_are_problems(hits: int, misses: int, corrupt: int, texts: list[str]) -> None:
    tier = TierStats(0, 10, hits, misses)
    settings = Settings(Policy.LRU, (0, 0, 10), 0, (0, 0, 0))
    stats = CacheStats("answers", "lru", settings, tier, tier, tier, hits, misses, 0, 0, 0, 0, corrupt, 0.0)
    found = problems([], [stats], [])
    assert [(each.level, each.text, each.kind) for each in found] == [("note", text, "lru") for text in texts]
