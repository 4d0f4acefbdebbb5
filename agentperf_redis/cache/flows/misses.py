"""Flows of a cache with on_unavailable="miss": while the server is unreachable, reads find nothing, writes do nothing.

Reads that describe the whole cache (`keys`, `scan`, `size`, `stats`, `series`), `sweep`, `flush`, `warm_up` and `incr`
still raise BackendUnavailable, since any answer could be false. Failed invalidations stay pending, as in any cache:
this process sends them before its next read or write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from agentperf_redis.cache.flows.invalidation import Eraser
from agentperf_redis.cache.flows.reads import Reader
from agentperf_redis.cache.flows.writes import Writer
from agentperf_redis.cache.model import CacheEntry, StoredCount, Tier
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable

M = TypeVar("M")
T = TypeVar("T")


def _or_miss(shared: SharedState, flow: Flow[T], miss: M) -> Flow[T | M]:
    try:
        return (yield from flow)
    except BackendUnavailable as error:
        shared.warn("cache %s: unavailable, so reads are misses and writes do nothing: %s", shared.name, error)
        return miss


class MissingReader(Reader):
    """Reads that find nothing while the server is unreachable."""

    def get(self, key: str, default: Any) -> Flow[Any]:
        """Return the value of a key, or the default."""
        return _or_miss(self.shared, super().get(key, default), default)

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> Flow[dict[str, Any]]:
        """Return a dict of the keys that have a value, with their values."""
        return _or_miss(self.shared, super().get_many(keys, fresh=fresh), {})

    def entry(self, key: str) -> Flow[CacheEntry | None]:
        """Return the value and the metadata of a key, or None if it has no value."""
        return _or_miss(self.shared, super().entry(key), None)

    def ttl(self, key: str) -> Flow[float | None]:
        """Return the seconds until a value expires; None if there is no value."""
        return _or_miss(self.shared, super().ttl(key), None)


class MissingWriter(Writer):
    """Writes that do nothing while the server is unreachable."""

    def put_in_mode(
        self, mode: str, key: str, value: Any, ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[bool]:
        """Store a value if the condition of the mode holds. Returns whether it was stored."""
        return _or_miss(self.shared, super().put_in_mode(mode, key, value, ttl, tags, tier), False)

    def touch(self, key: str, ttl: float | None) -> Flow[bool]:
        """Give a value another TTL. Returns whether there was a value."""
        return _or_miss(self.shared, super().touch(key, ttl), False)

    def put_many(
        self, values: Mapping[str, Any], ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[StoredCount]:
        """Store several values. Returns how many were stored, and which were refused."""
        # If the server is lost half-way, some of the values may be stored although they count as refused.
        stored = yield from _or_miss(self.shared, super().put_many(values, ttl, tags, tier), None)
        return StoredCount(0, tuple(values)) if stored is None else stored


class MissingEraser(Eraser):
    """Invalidations that raise no error while the server is unreachable. They stay pending."""

    def delete_many(self, keys: Iterable[str]) -> Flow[int]:
        """Remove entries. Returns how many existed."""
        return _or_miss(self.shared, super().delete_many(keys), 0)

    def pop(self, key: str, default: Any) -> Flow[Any]:
        """Remove one entry and return its value, or the default."""
        return _or_miss(self.shared, super().pop(key, default), default)

    def clear(self) -> Flow[None]:
        """Make every entry a miss."""
        return _or_miss(self.shared, super().clear(), None)

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Invalidate every entry with one of the tags."""
        return _or_miss(self.shared, super().invalidate_tags(tags), None)
