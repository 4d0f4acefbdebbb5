"""A pool and its keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis import keys
from agentperf_redis.keys import PoolKeys

MANY = 500
"""Max names in one request: Lua's `unpack` accepts only some 7,000 values, and a slow script blocks the server."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool and its keys."""

    agent_type: str
    keys: PoolKeys

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(namespace: str, agent_type: str) -> Pool:
        """Return the pool of an agent type."""
        return Pool(agent_type, keys.pool(namespace, agent_type))
