"""The asyncio versions of `LRUCache` and `TieredCache`, which run the same flows as the blocking classes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar, Unpack, overload

from agentperf_redis.backend import Backend
from agentperf_redis.cache.commands import Mode
from agentperf_redis.cache.compute import compute_async, wanted
from agentperf_redis.cache.flows import CacheFlows, inspection
from agentperf_redis.cache.flows.access_reports import flush_all
from agentperf_redis.cache.flows.reads import MISSING
from agentperf_redis.cache.freshness import FreshnessOptions
from agentperf_redis.cache.history import CacheSeriesRow
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.model import CacheEntry, CacheStats, StoredCount, Tier, chosen_tier
from agentperf_redis.cache.scanning import DEFAULT_BATCH, AsyncKeyScan, KeyPages
from agentperf_redis.cache.warm_up import DEFAULT_CONCURRENCY, OnProgress, WarmUpStatus, each_wanted, warm_async
from agentperf_redis.windows import Timestamp, Window

R = TypeVar("R")


class AsyncCache:
    """The common base of `AsyncLRUCache` and `AsyncTieredCache`."""

    def __init__(self, backend: Backend, flows: CacheFlows, maintenance: Maintenance) -> None:
        self._backend = backend
        self._flows = flows
        self._local = flows.reader.local
        self._maintenance = maintenance

    async def get(self, key: str, default: Any = None, *, fresh: bool = False) -> Any:
        """See `LRUCache.get`."""
        local = self._local
        if local is not None and not fresh:
            copy = local.find(key)
            if copy is not None:
                if copy.frozen:
                    return copy.value
                value = self._flows.reader.unpacked(copy)
                if value is not MISSING:
                    return value
        return await self._backend.arun(self._flows.reader.get(key, default))

    async def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> dict[str, Any]:
        """See `LRUCache.get_many`."""
        return await self._backend.arun(self._flows.reader.get_many(keys, fresh=fresh))

    async def entry(self, key: str) -> CacheEntry | None:
        """See `LRUCache.entry`."""
        return await self._backend.arun(self._flows.reader.entry(key))

    async def ttl(self, key: str) -> float | None:
        """See `LRUCache.ttl`."""
        return await self._backend.arun(self._flows.reader.ttl(key))

    async def touch(self, key: str, ttl: float | None = None) -> bool:
        """See `LRUCache.touch`."""
        return await self._backend.arun(self._flows.writer.touch(key, ttl))

    async def incr(
        self, key: str, by: int = 1, *, ttl: float | None = None, tags: Iterable[str] = (), create: bool = True
    ) -> int:
        """See `LRUCache.incr`."""
        return await self._backend.arun(self._flows.writer.increment(key, by, ttl, tags, create))

    async def pop(self, key: str, default: Any = None) -> Any:
        """See `LRUCache.pop`."""
        return await self._backend.arun(self._flows.eraser.pop(key, default))

    def scan(self, *, match: str | None = None, batch: int = DEFAULT_BATCH) -> AsyncKeyScan:
        """See `LRUCache.scan`. Iterate over the result with ``async for``."""
        return AsyncKeyScan(self._backend, KeyPages(self._flows.shared, match, batch))

    async def delete(self, key: str) -> bool:
        """See `LRUCache.delete`."""
        return await self._backend.arun(self._flows.eraser.delete(key))

    async def delete_many(self, keys: Iterable[str]) -> int:
        """See `LRUCache.delete_many`."""
        return await self._backend.arun(self._flows.eraser.delete_many(keys))

    async def clear(self) -> None:
        """See `LRUCache.clear`."""
        await self._backend.arun(self._flows.eraser.clear())

    async def invalidate_tags(self, *tags: str) -> None:
        """See `LRUCache.invalidate_tags`."""
        await self._backend.arun(self._flows.eraser.invalidate_tags(tags))

    async def sweep(self) -> int:
        """See `LRUCache.sweep`."""
        return await self._backend.arun(self._flows.eraser.sweep())

    async def flush(self) -> None:
        """See `LRUCache.flush`."""
        await self._backend.arun(flush_all(self._flows.shared))

    async def stats(self) -> CacheStats:
        """See `LRUCache.stats`."""
        return await self._backend.arun(inspection.stats(self._flows.shared))

    async def series(
        self, *, window: Window = "1h", step: Window = "1m", as_of: Timestamp = None
    ) -> tuple[CacheSeriesRow, ...]:
        """See `LRUCache.series`."""
        return await self._backend.arun(inspection.series(self._flows.shared, window, step, as_of))

    async def size(self) -> int:
        """See `LRUCache.size`."""
        return await self._backend.arun(inspection.size(self._flows.shared))

    async def keys(self) -> list[str]:
        """See `LRUCache.keys`."""
        return await self._backend.arun(inspection.oldest_first(self._flows.shared))

    @overload
    async def get_or_compute(
        self,
        key: str,
        function: Callable[[], Awaitable[R]],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> R: ...
    @overload
    async def get_or_compute(
        self,
        key: str,
        function: Callable[[], R],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> R: ...
    async def get_or_compute(
        self,
        key: str,
        function: Callable[[], Any],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> Any:
        """See `LRUCache.get_or_compute`; the function may be a coroutine function."""
        request = wanted(key, function, ttl, tags, freshness)
        return await compute_async(self._backend, self._flows, self._maintenance, request)

    async def warm_up(
        self,
        items: Iterable[str],
        function: Callable[[str], Any],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: OnProgress | None = None,
        **freshness: Unpack[FreshnessOptions],
    ) -> WarmUpStatus:
        """See `LRUCache.warm_up`; the function may be a coroutine function, and everything runs on the running loop."""
        request = each_wanted(items, function, ttl, tags, concurrency, progress, freshness)
        return await warm_async(self._backend, self._flows, self._maintenance, *request, progress)


class AsyncLRUCache(AsyncCache):
    """`LRUCache` for asyncio, available as `LRUCache.aio`. Each method does the same as its blocking namesake."""

    async def put(
        self,
        key: str,
        value: Any,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        if_version: int | None = None,
    ) -> bool:
        """See `LRUCache.put`."""
        return await self._backend.arun(self._flows.writer.put(key, value, ttl, tags, if_version=if_version))

    async def add(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """See `LRUCache.add`."""
        return await self._backend.arun(self._flows.writer.put_in_mode(Mode.ADD, key, value, ttl, tags))

    async def replace(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """See `LRUCache.replace`."""
        return await self._backend.arun(self._flows.writer.put_in_mode(Mode.REPLACE, key, value, ttl, tags))

    async def put_many(
        self, values: Mapping[str, Any], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> StoredCount:
        """See `LRUCache.put_many`."""
        return await self._backend.arun(self._flows.writer.put_many(values, ttl, tags))

    async def get_stats(self) -> dict[str, Any]:
        """See `LRUCache.get_stats`."""
        return (await self.stats()).render()


class AsyncTieredCache(AsyncCache):
    """`TieredCache` for asyncio, available as `TieredCache.aio`. Each method does the same as its blocking namesake."""

    async def put(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
        if_version: int | None = None,
    ) -> bool:
        """See `TieredCache.put`."""
        tier = chosen_tier(priority)
        return await self._backend.arun(self._flows.writer.put(key, value, ttl, tags, tier, if_version=if_version))

    async def add(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """See `TieredCache.add`."""
        tier = chosen_tier(priority)
        return await self._backend.arun(self._flows.writer.put_in_mode(Mode.ADD, key, value, ttl, tags, tier))

    async def replace(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """See `TieredCache.replace`."""
        tier = chosen_tier(priority)
        return await self._backend.arun(self._flows.writer.put_in_mode(Mode.REPLACE, key, value, ttl, tags, tier))

    async def put_many(
        self,
        values: Mapping[str, Any],
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> StoredCount:
        """See `TieredCache.put_many`."""
        return await self._backend.arun(self._flows.writer.put_many(values, ttl, tags, chosen_tier(priority)))

    async def get_stats(self) -> dict[str, dict[str, Any]]:
        """See `TieredCache.get_stats`."""
        return (await self.stats()).render_tiers()
