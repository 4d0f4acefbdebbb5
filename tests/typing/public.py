"""The types of the public names, for type checkers. This file is never run: mypy fails on a wrong assertion.

mypy must find an error in each ignored line, because under strict checks an unused ignore is itself an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, assert_type

from agentperf_redis import (
    AgentInstance,
    AgentPerf,
    Lease,
    MetricsCollector,
    RankBy,
    Retention,
    SystemSummary,
    cached,
    memory_forecast,
    track_performance,
)
from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.metrics.model import PerformanceMetrics

perf = AgentPerf()


@track_performance("planner", perf.metrics)
def plan(task: str, depth: int = 1) -> list[str]:
    return [task] * depth


@track_performance("planner", perf.metrics)
async def plan_async(task: str) -> list[str]:
    return [task]


@track_performance("planner", perf.metrics)
def stream(task: str) -> Generator[str, None, int]:
    yield task
    return 1


@track_performance("planner", perf.metrics)
async def stream_async(task: str) -> AsyncGenerator[str, None]:
    yield task


@cached(perf.cache("answers"), ttl=60)
def ask(question: str) -> int:
    return len(question)


@perf.tiered_cache("docs").cached()
async def fetch(page: str) -> bytes:
    return page.encode()


def blocking() -> None:
    assert_type(plan("x", depth=2), list[str])
    assert_type(stream("x"), Generator[str, None, int])
    assert_type(ask("x"), int)
    assert_type(ask.key("x"), str)
    lb = perf.balancer("round_robin")
    assert_type(lb.acquire("planner"), AgentInstance | None)
    with lb.lease("planner") as lease:
        assert_type(lease, Lease)
        assert_type(lease.instance, AgentInstance)
    assert_type(lb.release(lease), bool)
    assert_type(lb.status(), list[PoolStatus])
    assert_type(perf.metrics.get_all_metrics(window="5m"), dict[str, dict[str, Any]])
    assert_type(perf.metrics.get_or_create_metrics("planner"), PerformanceMetrics)
    assert_type(perf.metrics.summary(window="5m"), SystemSummary)
    assert_type(perf.metrics.rank(RankBy.P95)[0].metrics, PerformanceMetrics)
    kept = Retention(slices_10s=60.0)
    MetricsCollector(backend=perf.backend, retention=kept)
    assert_type(memory_forecast(kept, agents=5, per_second=0.5).total, int)
    plan(5)  # type: ignore[arg-type]  # an error: the decorated function keeps its parameters
    ask()  # type: ignore[call-arg]  # an error, for the same reason


async def asynchronous() -> None:
    assert_type(await plan_async("x"), list[str])
    assert_type(stream_async("x"), AsyncGenerator[str, None])
    assert_type(await fetch("x"), bytes)
    async with perf.balancer().aio.lease("planner") as lease:
        assert_type(lease, Lease)
    assert_type(await perf.balancer().aio.acquire("planner"), AgentInstance | None)
    assert_type(await perf.metrics.aio.get_all_metrics(), dict[str, dict[str, Any]])
    await fetch(5)  # type: ignore[arg-type]  # an error: the decorated function keeps its parameters
