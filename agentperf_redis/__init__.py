"""Shared metrics, caches and load balancing for fleets of AI agents, through one Redis or Valkey.

The first access to a name imports the module that defines it. So a program that uses one service does not wait for the
other services to load.
"""

import importlib
import logging
from typing import TYPE_CHECKING

from agentperf_redis.last_resort import LOGGER, LastResort

if TYPE_CHECKING:
    from agentperf_redis.agentperf import (
        AgentPerf,
    )
    from agentperf_redis.backend import (
        configure,
    )
    from agentperf_redis.balancer.client import (
        LoadBalancer,
    )
    from agentperf_redis.balancer.history import (
        PoolSeriesRow,
    )
    from agentperf_redis.balancer.lease import (
        Lease,
    )
    from agentperf_redis.balancer.model import (
        AgentInstance,
        LoadBalancingStrategy,
        Outcome,
    )
    from agentperf_redis.balancer.settings import (
        PoolSettings,
    )
    from agentperf_redis.cache.async_client import (
        AsyncLRUCache,
        AsyncTieredCache,
    )
    from agentperf_redis.cache.decorator import (
        AsyncCachedFunction,
        CachedFunction,
        CacheInfo,
        cached,
    )
    from agentperf_redis.cache.freshness import (
        FreshnessOptions,
    )
    from agentperf_redis.cache.history import (
        CacheSeriesRow,
    )
    from agentperf_redis.cache.lru import (
        LRUCache,
    )
    from agentperf_redis.cache.model import (
        CacheEntry,
        CacheStats,
        Policy,
        StoredCount,
        Tier,
        TierStats,
        WithoutServer,
    )
    from agentperf_redis.cache.tiered import (
        TieredCache,
    )
    from agentperf_redis.cache.warm_up import (
        WarmUpStatus,
    )
    from agentperf_redis.codec.storable import (
        storable,
    )
    from agentperf_redis.errors import (
        AgentPerfError,
        BackendFull,
        BackendUnavailable,
        ComputeFailed,
        CorruptState,
        InvalidArgument,
        LeaseLost,
        LockError,
        LockNotOwned,
        NoCapacity,
        NoInteger,
        SchemaMismatch,
        ScriptFailed,
    )
    from agentperf_redis.locks.client import (
        Lock,
        Semaphore,
    )
    from agentperf_redis.metrics.client import (
        MetricsCollector,
    )
    from agentperf_redis.metrics.comparison import (
        RankBy,
    )
    from agentperf_redis.metrics.model import (
        PerformanceMetrics,
        SystemSummary,
    )
    from agentperf_redis.metrics.retention import (
        Retention,
        memory_forecast,
    )
    from agentperf_redis.metrics.series import (
        SeriesRow,
    )
    from agentperf_redis.metrics.tracking import (
        track_performance,
    )
    from agentperf_redis.metrics.workers import (
        RunningExecution,
        WorkerInfo,
    )

__all__ = [
    "AgentInstance",
    "AgentPerf",
    "AgentPerfError",
    "AsyncCachedFunction",
    "AsyncLRUCache",
    "AsyncTieredCache",
    "BackendFull",
    "BackendUnavailable",
    "CacheEntry",
    "CacheInfo",
    "CacheSeriesRow",
    "CacheStats",
    "CachedFunction",
    "ComputeFailed",
    "CorruptState",
    "FreshnessOptions",
    "InvalidArgument",
    "LRUCache",
    "Lease",
    "LeaseLost",
    "LoadBalancer",
    "LoadBalancingStrategy",
    "Lock",
    "LockError",
    "LockNotOwned",
    "MetricsCollector",
    "NoCapacity",
    "NoInteger",
    "Outcome",
    "PerformanceMetrics",
    "Policy",
    "PoolSeriesRow",
    "PoolSettings",
    "RankBy",
    "Retention",
    "RunningExecution",
    "SchemaMismatch",
    "ScriptFailed",
    "Semaphore",
    "SeriesRow",
    "StoredCount",
    "SystemSummary",
    "Tier",
    "TierStats",
    "TieredCache",
    "WarmUpStatus",
    "WithoutServer",
    "WorkerInfo",
    "cached",
    "configure",
    "memory_forecast",
    "storable",
    "track_performance",
]

logging.getLogger(LOGGER).addHandler(LastResort())

_HOMES = {
    "AgentInstance": "balancer.model",
    "AgentPerf": "agentperf",
    "AgentPerfError": "errors",
    "AsyncCachedFunction": "cache.decorator",
    "AsyncLRUCache": "cache.async_client",
    "AsyncTieredCache": "cache.async_client",
    "BackendFull": "errors",
    "BackendUnavailable": "errors",
    "CacheEntry": "cache.model",
    "CacheInfo": "cache.decorator",
    "CacheSeriesRow": "cache.history",
    "CacheStats": "cache.model",
    "CachedFunction": "cache.decorator",
    "ComputeFailed": "errors",
    "CorruptState": "errors",
    "FreshnessOptions": "cache.freshness",
    "InvalidArgument": "errors",
    "LRUCache": "cache.lru",
    "Lease": "balancer.lease",
    "LeaseLost": "errors",
    "LoadBalancer": "balancer.client",
    "LoadBalancingStrategy": "balancer.model",
    "Lock": "locks.client",
    "LockError": "errors",
    "LockNotOwned": "errors",
    "MetricsCollector": "metrics.client",
    "NoCapacity": "errors",
    "NoInteger": "errors",
    "Outcome": "balancer.model",
    "PerformanceMetrics": "metrics.model",
    "Policy": "cache.model",
    "PoolSeriesRow": "balancer.history",
    "PoolSettings": "balancer.settings",
    "RankBy": "metrics.comparison",
    "Retention": "metrics.retention",
    "RunningExecution": "metrics.workers",
    "SchemaMismatch": "errors",
    "ScriptFailed": "errors",
    "Semaphore": "locks.client",
    "SeriesRow": "metrics.series",
    "StoredCount": "cache.model",
    "SystemSummary": "metrics.model",
    "Tier": "cache.model",
    "TierStats": "cache.model",
    "TieredCache": "cache.tiered",
    "WarmUpStatus": "cache.warm_up",
    "WithoutServer": "cache.model",
    "WorkerInfo": "metrics.workers",
    "cached": "cache.decorator",
    "configure": "backend",
    "memory_forecast": "metrics.retention",
    "storable": "codec.storable",
    "track_performance": "metrics.tracking",
}

if not TYPE_CHECKING:  # a type checker that sees `__getattr__` accepts any name

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted(globals().keys() | _HOMES.keys())
