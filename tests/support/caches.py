"""Internal state of a cache in this process, for tests."""

from __future__ import annotations

from agentperf_redis import LRUCache, TieredCache
from tests.support.servers import wait_until


def copied(cache: LRUCache, key: str) -> None:
    """Read a key until a local copy has it."""
    local = cache._shared_state.local
    assert local is not None
    wait_until(lambda: (cache.get(key), local.find(key))[1], f"a copy of {key}")


def waiting(cache: LRUCache | TieredCache, key: str) -> int:
    """Return how many callers in this process wait for the caller that computes the value or claims the lease."""
    flight = cache._shared_state.flights._flights.get(key)
    return len(flight.ended._callbacks) if flight else 0
