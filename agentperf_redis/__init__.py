"""Shared metrics, caches and load balancing for fleets of AI agents, through one Redis or Valkey."""

import logging

from agentperf_redis.backend import configure
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy, Outcome
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.cache.decorator import cached
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.model import CacheEntry
from agentperf_redis.cache.tiered import TieredCache
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    ComputeFailed,
    CorruptState,
    InvalidArgument,
    LeaseLost,
    NoCapacity,
    SchemaMismatch,
    ScriptFailed,
)
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.comparison import RankBy
from agentperf_redis.metrics.model import PerformanceMetrics, SystemSummary
from agentperf_redis.metrics.retention import Retention, memory_forecast
from agentperf_redis.metrics.tracking import track_performance
from agentperf_redis.registry import storable
from agentperf_redis.service import AgentPerf

__all__ = [
    "AgentInstance",
    "AgentPerf",
    "AgentPerfError",
    "BackendFull",
    "BackendUnavailable",
    "CacheEntry",
    "ComputeFailed",
    "CorruptState",
    "InvalidArgument",
    "LRUCache",
    "Lease",
    "LeaseLost",
    "LoadBalancer",
    "LoadBalancingStrategy",
    "MetricsCollector",
    "NoCapacity",
    "Outcome",
    "PerformanceMetrics",
    "PoolSettings",
    "RankBy",
    "Retention",
    "SchemaMismatch",
    "ScriptFailed",
    "SystemSummary",
    "TieredCache",
    "cached",
    "configure",
    "memory_forecast",
    "storable",
    "track_performance",
]

logging.getLogger("agentperf_redis").addHandler(logging.NullHandler())
