"""Caches shared by all processes: bounded, optionally tiered, with single-flight computation of missing values."""

from agentperf_redis.cache.async_client import AsyncLRUCache, AsyncTieredCache
from agentperf_redis.cache.decorator import cached
from agentperf_redis.cache.freshness import FreshnessOptions
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.model import CacheEntry, CacheStats, Policy, Tier, TierStats, WithoutServer
from agentperf_redis.cache.tiered import TieredCache
from agentperf_redis.cache.warm_up import WarmUpStatus

__all__ = [
    "AsyncLRUCache",
    "AsyncTieredCache",
    "CacheEntry",
    "CacheStats",
    "FreshnessOptions",
    "LRUCache",
    "Policy",
    "Tier",
    "TierStats",
    "TieredCache",
    "WarmUpStatus",
    "WithoutServer",
    "cached",
]
