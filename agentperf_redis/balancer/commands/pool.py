"""A shard of a pool and its keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis import keys
from agentperf_redis.keys import PoolKeys

MANY = 500
"""Max names in one request: Lua's `unpack` accepts only some 7,000 values, and a slow script blocks the server."""
MAX_SHARDS = 256


@dataclass(frozen=True, slots=True)
class Pool:
    """One shard of a pool, and its keys. Most pools have one shard. Commands apply to one shard.

    A `Pool` with one shard also stands for the whole pool, even if the pool has several shards; see `layouts.py`.

    Attributes:
        agent_type: the pool.
        keys: the keys of the shard.
        shard: number of the shard, from 0.
        shards: number of shards of the pool.
    """

    agent_type: str
    keys: PoolKeys
    shard: int = 0
    shards: int = 1

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(namespace: str, agent_type: str, shard: int = 0, shards: int = 1) -> Pool:
        """Return a shard of the pool of an agent type."""
        return Pool(agent_type, keys.pool(namespace, agent_type, shard, shards), shard, shards)
