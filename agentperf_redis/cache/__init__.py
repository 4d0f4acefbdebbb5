"""Caches shared by all processes: bounded, in tiers, and computing each missing value once."""

from agentperf_redis.cache.decorator import cached
from agentperf_redis.cache.lru import AsyncLRUCache, LRUCache
from agentperf_redis.cache.model import CacheEntry, CacheStats, Policy, Tier, TierStats
from agentperf_redis.cache.tiered import AsyncTieredCache, TieredCache

__all__ = [
    "AsyncLRUCache",
    "AsyncTieredCache",
    "CacheEntry",
    "CacheStats",
    "LRUCache",
    "Policy",
    "Tier",
    "TierStats",
    "TieredCache",
    "cached",
]
