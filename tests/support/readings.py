"""Readings of a namespace for tests without a server."""

from __future__ import annotations

from agentperf_redis import AgentInstance
from agentperf_redis.balancer.model import InstanceState, InstanceStatus, LoadBalancingStrategy, PoolStatus
from agentperf_redis.cache.model import CacheStats, Policy, Settings, TierStats
from agentperf_redis.errors import CorruptState
from agentperf_redis.export.reading import Reading
from agentperf_redis.metrics.counters import Counters

BUCKETS = {-320: 1, -160: 2, -3: 5, -2: 1, 0: 7, 15: 4, 16: 1, 240: 3}


def counters(*, models: bool = True) -> Counters:
    """Return the counters of an agent: 26 executions, errors and usage. Most usage belongs to the model gpt-x."""
    counts = {
        "n": 26,
        "ok": 20,
        "err": 4,
        "cancelled": 2,
        "h:zero": 2,
        "sum_us": 123_456_789,
        "min_us": 0,
        "max_us": 40_000_000_000,
        "first_ms": 1_760_000_000_000,
        "last_ms": 1_760_000_123_456,
        "llm_calls": 9,
        "tool_calls": 3,
        "tok_in": 1000,
        "tok_out": 300,
        "cost_nano": 2_500_000_001,
        "tok_cached_in": 400,
        "tok_cache_write": 50,
        "tok_reasoning": 120,
    }
    by_model = {"gpt-x": {"n": 7, "tok_in": 900, "tok_out": 250, "cost_nano": 2_000_000_000, "tok_reasoning": 120}}
    return Counters(counts, {"TimeoutError": 3, "odd": 1}, BUCKETS, by_model if models else {}, (), (0, 0))


def cache(name: str, kind: str, *, max_bytes: int = 0) -> CacheStats:
    """Return the statistics of a cache."""
    settings = Settings(Policy.LRU, (10, 10, 10), max_bytes, (0, 0, 0))
    hot, warm, cold = (TierStats(size, 10, hits, 1) for size, hits in ((1, 5), (2, 6), (3, 7)))
    return CacheStats(name, kind, settings, hot, warm, cold, 18, 4, 6, 2048, 2, 3, 1, 12.5)


def pool(name: str) -> PoolStatus:
    """Return the status of a pool with two instances, one of them ejected."""
    instances = tuple(
        InstanceStatus(AgentInstance(instance, name, load, 4, response_time_ms=250.0), 3, 100, 7, 1, 9, state, 4)
        for instance, load, state in (("i1", 2, InstanceState.UP), ("i2", 1, InstanceState.EJECTED))
    )
    return PoolStatus(name, LoadBalancingStrategy.LEAST_LOADED, instances, 5, 107, 1, panic_for=3.0)


def reading(*agents: str) -> Reading:
    """Return a reading of these agents, of caches and pools with the same names, and of one part that has failed."""
    return Reading(
        namespace="tests",
        version="1.2",
        agents={agent: counters(models=number % 2 == 0) for number, agent in enumerate(agents)},
        caches=tuple(cache(name, kind, max_bytes=10**6) for name in agents for kind in ("lru", "tiered")),
        pools=tuple(pool(name) for name in agents),
        took={"agents": 0.25, "caches": 0.5, "pools": 0.125},
        errors={"pools": CorruptState("key", "text")},
    )
