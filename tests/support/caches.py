"""What tests look at within a cache of their own process."""

from __future__ import annotations

from agentperf_redis import LRUCache, TieredCache
from tests.support.servers import wait_until


def copied(cache: LRUCache, key: str) -> None:
    """Read until a copy answers."""
    local = cache._shared_state.local
    assert local is not None
    wait_until(lambda: (cache.get(key), local.find(key))[1], f"a copy of {key}")


def waiting(cache: LRUCache | TieredCache, key: str) -> int:
    """How many threads or tasks of this process wait for the one that computes, or claims."""
    flight = cache._shared_state.flights._flights.get(key)
    return len(flight.ended._callbacks) if flight else 0
