"""The caches as users meet them: each a blocking class, and its asyncio twin under ``.aio``.

The twins have the same methods over the same state; the blocking one is documented.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, default_backend
from agentperf_redis.cache import flows
from agentperf_redis.cache.binding import Binding
from agentperf_redis.cache.chores import Chores
from agentperf_redis.cache.computing import checked, compute, compute_async
from agentperf_redis.cache.decorator import Decorator, cached, function_key
from agentperf_redis.cache.model import (
    TIERS_OWN_TTL_MS,
    CacheEntry,
    CacheStats,
    DefaultCount,
    DefaultSeconds,
    Policy,
    Settings,
    Tier,
    chosen,
    default_ttl_ms,
)
from agentperf_redis.codec import Codec
from agentperf_redis.errors import InvalidArgument

R = TypeVar("R")


class _Cache:
    """What LRUCache and TieredCache have in common."""

    _service: str

    def __init__(
        self,
        settings: Settings,
        given: Sequence[object],
        name: str,
        backend: Backend | None,
        codec: Codec | None,
        *,
        strict: bool,
        local_size: int | None,
        local_bytes: int | None,
    ) -> None:
        self.name = arguments.name("name", name)
        marks = "".join("1" if chosen(option) else "0" for option in given)
        self._backend = default_backend() if backend is None else backend
        chores = self._backend.share("cache chores", lambda: Chores(self._backend))
        self._binding = self._backend.share(
            ("cache", self._service, name),
            lambda: Binding(self._backend, self._service, name, settings, marks, chores.report_soon),
        )
        self._binding.adopt(self, settings, marks)
        self._chores = chores
        local = None
        if local_size is not None or local_bytes is not None:
            if arguments.flag("strict", strict):
                raise InvalidArgument("strict", strict, "False where local copies answer, which note nothing at once")
            local = self._binding.use_local(
                _LOCAL_SIZE if local_size is None else arguments.count("local_size", local_size),
                None if local_bytes is None else arguments.count("local_bytes", local_bytes, most=_MOST_BYTES),
            )
        self._flows = flows.CacheFlows(
            self._binding,
            codec or Codec(),
            strict=arguments.flag("strict", strict),
            own_ttls_ms=_own_ttls(settings, given),
            local=local,
        )
        self._local = local

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self._binding.settings.text!r})"

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """Return how many entries there are: what ``len(cache)`` is, which has no asyncio twin."""
        return self._backend.run(self._flows.size())

    def get(self, key: str, default: Any = None, *, fresh: bool = False) -> Any:
        """Return the value of a key, or the default: one read command in whatever tier it stands, none if copied here.

        Args:
            key: any string.
            default: returned when there is no value; a cached None is a value.
            fresh: ask the server even if there is a local copy.

        Raises:
            InvalidArgument: the key is no string that can be encoded.
            BackendUnavailable: the server did not answer.
        """
        if self._local is not None and not fresh:
            copy = self._local.find(key)
            if copy is not None:
                value = copy.value if copy.frozen else self._flows.unpacked(copy)
                if value is not flows.MISSING:
                    return value
        return self._backend.run(self._flows.get(key, default))

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> dict[str, Any]:
        """Return the values of those keys that have one, by key. One command for each 256 keys."""
        return self._backend.run(self._flows.get_many(keys, fresh=fresh))

    def entry(self, key: str) -> CacheEntry | None:
        """Return all that is known of a key, or None. It does not count as a read."""
        return self._backend.run(self._flows.entry(key))

    def delete(self, key: str) -> bool:
        """Remove a key, and refuse the value of whoever computes it at this moment.

        Returns:
            Whether there was a value.
        """
        return self._backend.run(self._flows.delete(key))

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove keys as `delete` does.

        Returns:
            How many had a value.
        """
        return self._backend.run(self._flows.delete_many(keys))

    def clear(self) -> None:
        """Make every key a miss, at once and at a cost that does not depend on how many there are."""
        self._backend.run(self._flows.clear())

    def invalidate_tags(self, *tags: str) -> None:
        """Make every entry that was stored with one of the tags a miss, at once and however many there are."""
        self._backend.run(self._flows.invalidate_tags(tags))

    def sweep(self) -> int:
        """Clear away what is expired, cleared or dropped by the server. Puts do so by and by; this does it now.

        Returns:
            How many entries and values were cleared away.
        """
        return self._backend.run(self._flows.sweep())

    def flush(self) -> None:
        """Report the reads that this process has served since; done by itself within 0.2 s."""
        self._backend.run(flows.flush(self._binding))

    def stats(self) -> CacheStats:
        """Return what all processes together have done with the cache, this one's latest reads included."""
        return self._backend.run(self._flows.stats())

    def keys(self) -> list[str]:
        """Return all keys, the next to leave first. Keys beyond 120 bytes appear under their hashed names."""
        return self._backend.run(self._flows.oldest_first())

    @overload
    def get_or_compute(
        self, key: str, function: Callable[[], R], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> R: ...
    @overload
    def get_or_compute(
        self, key: str, function: Callable[[], Any], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> Any: ...
    def get_or_compute(
        self, key: str, function: Callable[[], Any], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> Any:
        """Return the value of a key; if there is none, have one caller in all processes compute it, and wait for it.

        A value that cannot be stored is returned as it is. If the server is away, the function is called.

        Args:
            key: any string.
            function: computes the value.
            ttl: life, seconds; None is the cache's, `math.inf` for ever.
            tags: names by which it can be invalidated.

        Raises:
            ComputeFailed: another process computed for us, and its function raised.
        """
        tags = checked(key, ttl, tags)
        return compute(self._backend, self._flows, self._chores, key, function, ttl, tags)

    def cached(
        self,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        key: str | Callable[..., str] | None = None,
        ignore: Iterable[str] = (),
        version: str | int = "",
    ) -> Decorator:
        """Cache a function's results; see `agentperf_redis.cached`."""
        return cached(self, ttl, tags=tags, key=key, ignore=ignore, version=version)

    @property
    def hits(self) -> int:
        """Reads served, in all processes."""
        return self.stats().hits

    @property
    def misses(self) -> int:
        """Reads not served, in all processes."""
        return self.stats().misses

    def _make_key(self, func_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return a key for a function's arguments, by their types and values."""
        return function_key(func_name, (args, kwargs))


class _AsyncCache:
    """The asyncio twin of `_Cache`."""

    def __init__(self, backend: Backend, its_flows: flows.CacheFlows, chores: Chores) -> None:
        self._backend = backend
        self._flows = its_flows
        self._local = its_flows.local
        self._chores = chores

    async def get(self, key: str, default: Any = None, *, fresh: bool = False) -> Any:
        """See `LRUCache.get`."""
        if self._local is not None and not fresh:
            copy = self._local.find(key)
            if copy is not None:
                value = copy.value if copy.frozen else self._flows.unpacked(copy)
                if value is not flows.MISSING:
                    return value
        return await self._backend.arun(self._flows.get(key, default))

    async def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> dict[str, Any]:
        """See `LRUCache.get_many`."""
        return await self._backend.arun(self._flows.get_many(keys, fresh=fresh))

    async def entry(self, key: str) -> CacheEntry | None:
        """See `LRUCache.entry`."""
        return await self._backend.arun(self._flows.entry(key))

    async def delete(self, key: str) -> bool:
        """See `LRUCache.delete`."""
        return await self._backend.arun(self._flows.delete(key))

    async def delete_many(self, keys: Iterable[str]) -> int:
        """See `LRUCache.delete_many`."""
        return await self._backend.arun(self._flows.delete_many(keys))

    async def clear(self) -> None:
        """See `LRUCache.clear`."""
        await self._backend.arun(self._flows.clear())

    async def invalidate_tags(self, *tags: str) -> None:
        """See `LRUCache.invalidate_tags`."""
        await self._backend.arun(self._flows.invalidate_tags(tags))

    async def sweep(self) -> int:
        """See `LRUCache.sweep`."""
        return await self._backend.arun(self._flows.sweep())

    async def flush(self) -> None:
        """See `LRUCache.flush`."""
        await self._backend.arun(flows.flush(self._flows.binding))

    async def stats(self) -> CacheStats:
        """See `LRUCache.stats`."""
        return await self._backend.arun(self._flows.stats())

    async def size(self) -> int:
        """See `LRUCache.size`."""
        return await self._backend.arun(self._flows.size())

    async def keys(self) -> list[str]:
        """See `LRUCache.keys`."""
        return await self._backend.arun(self._flows.oldest_first())

    @overload
    async def get_or_compute(
        self, key: str, function: Callable[[], Awaitable[R]], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> R: ...
    @overload
    async def get_or_compute(
        self, key: str, function: Callable[[], R], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> R: ...
    async def get_or_compute(
        self, key: str, function: Callable[[], Any], ttl: float | None = None, *, tags: Iterable[str] = ()
    ) -> Any:
        """See `LRUCache.get_or_compute`; the function may be a coroutine function."""
        tags = checked(key, ttl, tags)
        return await compute_async(self._backend, self._flows, self._chores, key, function, ttl, tags)


class LRUCache(_Cache):
    """A cache shared by all processes, of bounded size: the entry least recently used leaves first.

    A read costs one plain command. Reads are reported with the next put, or after 0.2 s: within one process entries
    leave exactly in the order of a textbook LRU; with several it is exact to that delay, or to the read with `strict`.

    Args:
        max_size: entries it holds.
        default_ttl: life of entries that are put without one, seconds; None is the cache's, which is for ever if nobody
            gave it one; `math.inf` is for ever.
        name: of the cache; every object of that name in any process is the same cache.
        backend: where it lies; by default the process-wide one.
        max_bytes: bytes of all keys and values together; None is no limit.
        policy: who leaves when it is full.
        strict: note each read at once, by one script call a read.
        local_size: entries copied within this process, where a hit costs no round trip; None copies none. What other
            processes change may be served from there for 0.25 s more.
        local_bytes: bytes of their keys and values together.
        codec: turns values into bytes.

    Options that are not given are those the cache has already, in whatever process it was made; the defaults are for
    a new one. An option that is given and differs holds from then on for every process, which is logged as a warning;
    but a TTL that is given applies to all puts of this object.

    Raises:
        InvalidArgument: for a limit, TTL or name that cannot be, or limits other than those of a living object of this
            cache in this process.
    """

    _service = "cache"

    def __init__(
        self,
        max_size: int = DefaultCount(1000),
        default_ttl: float | None = None,
        *,
        name: str = "default",
        backend: Backend | None = None,
        max_bytes: int | None = None,
        policy: Policy | str | None = None,
        strict: bool = False,
        local_size: int | None = None,
        local_bytes: int | None = None,
        codec: Codec | None = None,
    ) -> None:
        given = (policy, None, None, max_size, max_bytes, None, None, default_ttl)
        self.max_size = arguments.count("max_size", max_size)
        self.default_ttl = default_ttl
        settings = Settings(
            Policy.LRU if policy is None else arguments.choice("policy", policy, Policy),
            (0, 0, self.max_size),
            0 if max_bytes is None else arguments.count("max_bytes", max_bytes, most=_MOST_BYTES),
            (0, 0, default_ttl_ms("default_ttl", default_ttl)),
        )
        super().__init__(
            settings, given, name, backend, codec, strict=strict, local_size=local_size, local_bytes=local_bytes
        )
        self._aio = AsyncLRUCache(self._backend, self._flows, self._chores)

    @property
    def aio(self) -> AsyncLRUCache:
        """The same methods for asyncio."""
        return self._aio

    def put(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value.

        Args:
            key: any string.
            value: see `agentperf_redis.codec.Codec.encode`; it comes back equal and of the same type.
            ttl: life, seconds; None is the cache's, `math.inf` for ever.
            tags: names by which it can be invalidated.

        Returns:
            Whether it was stored: False if it is larger than the whole cache, or if in doubt after a lost connection.

        Raises:
            InvalidArgument: an argument cannot be; nothing was sent.
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.put(key, value, ttl, tags))

    def put_many(self, values: Mapping[str, Any], ttl: float | None = None, *, tags: Iterable[str] = ()) -> int:
        """Store several values, in one round trip for each 256 of them.

        Returns:
            How many were stored.
        """
        return self._backend.run(self._flows.put_many(values, ttl, tags))

    def get_stats(self) -> dict[str, Any]:
        """Return size, max_size, hits, misses, hit_rate (text) and total_requests; `stats` says more."""
        return self.stats().render()

    @property
    def cache(self) -> dict[str, CacheEntry]:
        """All entries as they are now, by key. For looking: it reads the whole cache."""
        entries = ((key, self.entry(key)) for key in self.keys())
        return {key: entry for key, entry in entries if entry is not None}

    @property
    def access_order(self) -> list[str]:
        """All keys, the least recently used first."""
        return self.keys()


class AsyncLRUCache(_AsyncCache):
    """The asyncio twin of LRUCache, to be had as ``cache.aio``."""

    async def put(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """See `LRUCache.put`."""
        return await self._backend.arun(self._flows.put(key, value, ttl, tags))

    async def put_many(self, values: Mapping[str, Any], ttl: float | None = None, *, tags: Iterable[str] = ()) -> int:
        """See `LRUCache.put_many`."""
        return await self._backend.arun(self._flows.put_many(values, ttl, tags))

    async def get_stats(self) -> dict[str, Any]:
        """See `LRUCache.get_stats`."""
        return (await self.stats()).render()


class TierView:
    """One tier of a TieredCache, looked at."""

    def __init__(self, cache: TieredCache, tier: Tier, max_size: int, default_ttl: float | None) -> None:
        self._cache = cache
        self.tier = tier
        self.max_size = max_size
        self.default_ttl = default_ttl

    def __repr__(self) -> str:
        return f"TierView({self._cache.name!r}, {self.tier.value!r})"

    def get_stats(self) -> dict[str, Any]:
        """Return size, max_size, hits, misses, hit_rate (text) and total_requests of this tier."""
        shown: dict[str, Any] = self._cache.get_stats()[self.tier.value]
        return shown

    @property
    def hits(self) -> int:
        """Reads that found their entry in this tier, in all processes."""
        return int(self.get_stats()["hits"])

    @property
    def misses(self) -> int:
        """Reads that came to this tier and had to go on."""
        return int(self.get_stats()["misses"])


class TieredCache(_Cache):
    """A cache shared by all processes, in three tiers, each with its own room and TTL.

    A value lies in one place whatever its tier, and a read costs one plain command. A read moves an entry up by one
    tier; a full tier moves its oldest down. What has moved keeps its time to live.

    Args:
        hot_size: entries that hot holds.
        warm_size: entries that warm holds.
        cold_size: entries that cold holds; it may use what the others leave free.
        hot_ttl: life of entries put into hot without one, seconds; None is for ever.
        warm_ttl: the same for warm.
        cold_ttl: the same for cold, and for entries whose tier the policy chooses.
        name: of the cache; every object of that name in any process is the same cache.
        backend: where it lies; by default the process-wide one.
        max_bytes: bytes of all keys and values together; None is no limit.
        policy: who leaves when it is full. By default the less frequently used of a newcomer and an old entry.
        strict: note each read at once, by one script call a read.
        local_size: entries copied within this process, where a hit costs no round trip; None copies none. What other
            processes change may be served from there for 0.25 s more.
        local_bytes: bytes of their keys and values together.
        codec: turns values into bytes.

    Options that are not given are those the cache has already, in whatever process it was made; the defaults are for
    a new one. An option that is given and differs holds from then on for every process, which is logged as a warning;
    but a TTL that is given applies to all puts of this object.

    Raises:
        InvalidArgument: for a limit, TTL or name that cannot be, or limits other than those of a living object of this
            cache in this process.
    """

    _service = "tiered"

    def __init__(
        self,
        hot_size: int = DefaultCount(100),
        warm_size: int = DefaultCount(500),
        cold_size: int = DefaultCount(2000),
        hot_ttl: float | None = DefaultSeconds(300),
        warm_ttl: float | None = DefaultSeconds(1800),
        cold_ttl: float | None = DefaultSeconds(3600),
        *,
        name: str = "default",
        backend: Backend | None = None,
        max_bytes: int | None = None,
        policy: Policy | str | None = None,
        strict: bool = False,
        local_size: int | None = None,
        local_bytes: int | None = None,
        codec: Codec | None = None,
    ) -> None:
        # here None is for ever, and so it is a choice
        ttls = [math.inf if ttl is None else ttl for ttl in (hot_ttl, warm_ttl, cold_ttl)]
        given = (policy, hot_size, warm_size, cold_size, max_bytes, *ttls)
        rooms = (
            arguments.count("hot_size", hot_size),
            arguments.count("warm_size", warm_size),
            arguments.count("cold_size", cold_size),
        )
        settings = Settings(
            Policy.TINYLFU if policy is None else arguments.choice("policy", policy, Policy),
            rooms,
            0 if max_bytes is None else arguments.count("max_bytes", max_bytes, most=_MOST_BYTES),
            (
                default_ttl_ms("hot_ttl", hot_ttl),
                default_ttl_ms("warm_ttl", warm_ttl),
                default_ttl_ms("cold_ttl", cold_ttl),
            ),
        )
        super().__init__(
            settings, given, name, backend, codec, strict=strict, local_size=local_size, local_bytes=local_bytes
        )
        self.hot = TierView(self, Tier.HOT, rooms[0], hot_ttl)
        self.warm = TierView(self, Tier.WARM, rooms[1], warm_ttl)
        self.cold = TierView(self, Tier.COLD, rooms[2], cold_ttl)
        self._aio = AsyncTieredCache(self._backend, self._flows, self._chores)

    @property
    def aio(self) -> AsyncTieredCache:
        """The same methods for asyncio."""
        return self._aio

    def put(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store a value.

        Args:
            key: any string.
            value: see `agentperf_redis.codec.Codec.encode`; it comes back equal and of the same type.
            priority: "hot", "warm" or "cold"; None lets the policy place it, or leaves it in its tier.
            ttl: life, seconds; None is that of the tier it is placed in, `math.inf` for ever.
            tags: names by which it can be invalidated.

        Returns:
            Whether it was stored: False if it is larger than the whole cache, or if in doubt after a lost connection.

        Raises:
            InvalidArgument: an argument cannot be; nothing was sent.
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.put(key, value, ttl, tags, _tier(priority)))

    def put_many(
        self,
        values: Mapping[str, Any],
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> int:
        """Store several values, in one round trip for each 256 of them.

        Returns:
            How many were stored.
        """
        return self._backend.run(self._flows.put_many(values, ttl, tags, _tier(priority)))

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """Return for hot, warm and cold what `LRUCache.get_stats` returns; `stats` says more."""
        return self.stats().render_tiers()


class AsyncTieredCache(_AsyncCache):
    """The asyncio twin of TieredCache, to be had as ``cache.aio``."""

    async def put(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """See `TieredCache.put`."""
        return await self._backend.arun(self._flows.put(key, value, ttl, tags, _tier(priority)))

    async def put_many(
        self,
        values: Mapping[str, Any],
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> int:
        """See `TieredCache.put_many`."""
        return await self._backend.arun(self._flows.put_many(values, ttl, tags, _tier(priority)))

    async def get_stats(self) -> dict[str, dict[str, Any]]:
        """See `TieredCache.get_stats`."""
        return (await self.stats()).render_tiers()


_LOCAL_SIZE = 10_000
"""Entries copied when only their bytes are limited."""
_MOST_BYTES = 10**15
"""More than any server has; sums of it stay exact in a double."""


def _own_ttls(settings: Settings, given: Sequence[object]) -> tuple[int, int, int]:
    """Return the lives that one object applies to its puts: those it was made with."""
    hot, warm, cold = (
        ms if chosen(option) else TIERS_OWN_TTL_MS for ms, option in zip(settings.ttls_ms, given[-3:], strict=True)
    )
    return hot, warm, cold


def _tier(priority: Tier | str | None) -> Tier | None:
    return None if priority is None else arguments.choice("priority", priority, Tier)
