"""`TieredCache`: hot, warm and cold tiers, each with its own capacity and TTL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.async_client import AsyncTieredCache
from agentperf_redis.cache.client import MAX_CACHE_BYTES
from agentperf_redis.cache.commands import Mode
from agentperf_redis.cache.decorator import DecoratingCache
from agentperf_redis.cache.flows.single_flight import DEFAULT_LEASE_S
from agentperf_redis.cache.model import (
    DefaultCount,
    DefaultSeconds,
    Policy,
    Settings,
    StoredCount,
    Tier,
    WithoutServer,
    checked_shards,
    chosen_tier,
    default_ttl_ms,
)
from agentperf_redis.codec.codec import Codec

_SIZES = (DefaultCount(100), DefaultCount(500), DefaultCount(2000))
"""Default maximum numbers of entries in hot, warm and cold."""


class TierView:
    """A read-only view of one tier of a TieredCache."""

    _cache: TieredCache
    tier: Tier
    max_size: int
    default_ttl: float | None

    def __init__(self, cache: TieredCache, tier: Tier, max_size: int, default_ttl: float | None) -> None:
        set_field = super().__setattr__
        set_field("_cache", cache)
        set_field("tier", tier)
        set_field("max_size", max_size)
        set_field("default_ttl", default_ttl)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        how = f"give {self.tier.value}_{'ttl' if name == 'default_ttl' else 'size'}= to the TieredCache"
        raise AttributeError(f"a TierView is read-only; to change {name}, {how}")

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
        """Reads that did not find their entry in this tier or in a tier above it."""
        return int(self.get_stats()["misses"])


class TieredCache(DecoratingCache):
    """A cache shared by all processes, in three tiers, each with its own capacity and TTL.

    A value is stored in the same place whatever its tier, so a read costs one plain command. A read promotes an entry
    by one tier; a full tier demotes its oldest entry. A moved entry keeps its expiry time.

    Args:
        hot_size: maximum number of entries in hot. If all three sizes are 0, this object is switched off, as
            ``LRUCache(max_size=0)`` is.
        warm_size: maximum number of entries in warm.
        cold_size: maximum number of entries in cold; cold may also use the free capacity of hot and warm.
        hot_ttl: TTL, in seconds, of entries put into hot without a TTL; None means no expiry.
        warm_ttl: TTL, in seconds, of entries put into warm without a TTL; None means no expiry.
        cold_ttl: TTL, in seconds, of all other entries put without a TTL: those put into cold, and those whose tier the
            policy chooses. None means no expiry.
        name: name of the cache. All objects of this name, in all processes, are the same cache. By default, the cache
            is named after the place in the code where the object is made. For example, ``users = TieredCache()`` in the
            module app makes a cache named ``app.users``.
        backend: the server and namespace; by default the process-wide one.
        max_bytes: maximum total size, in bytes, of all keys and values; None means no limit. Two things are not
            counted: popped values, and the short replies of `add`, `replace`, `incr`, `touch` and ``put(if_version=)``.
            They stay on the server until the deadline of their call has passed.
        policy: which entry is evicted when the cache is full. By default, a new entry is compared with an old one, and
            the less frequently used of the two is evicted.
        strict: record each read at once, with one script call per read.
        local_size: maximum number of local copies in this process; None means no local copies. A hit of a local copy
            costs no round trip. For up to 0.25 s after another process has changed a value, a hit may return the old
            value.
        local_bytes: maximum total size, in bytes, of the keys and values of the local copies.
        codec: encodes and decodes values.
        lease: seconds for which waiters are delayed if the process that computes their value crashes. A live process
            renews its lease, no matter how long it computes.
        shards: number of shards among which the entries are divided, a power of two up to 256. On a Cluster, each shard
            has a slot of its own, so the shards spread over the nodes. Each shard evicts on its own, and has an equal
            share of the limits. This share must be at least 250 entries. A shard has ``max_bytes / shards`` bytes, and
            no value can be larger than that. None keeps the number that the cache has; a new cache has 1. Operations on
            several keys are atomic for each shard only. An invalidation is acknowledged when all shards have it.
        on_unavailable: what happens while the server is unreachable. "compute": `get_or_compute` and decorated
            functions return a stale local copy if `FreshnessOptions` allow it; otherwise they call the function, once
            per process. All other methods raise BackendUnavailable. "raise": `get_or_compute` and decorated functions
            raise it too. "miss": `get_or_compute` and decorated functions behave as with "compute". Besides, `get`,
            `get_many`, `entry`, `ttl` and `pop` find nothing, and `put`, `add`, `replace`, `touch` and `put_many` store
            nothing. `delete`, `clear` and `invalidate_tags` return; their requests are sent before the next call that
            reaches the server. Only `incr`, and methods that describe the whole cache, still raise. A write that fails
            leaves the older value, which is served again after the outage.

    If an option is not given, the cache keeps its present value, whichever process has set it. A new cache gets the
    defaults. A given option that differs from the present value applies to every process from then on, and a warning is
    logged. A given TTL always applies to the puts of this object, even if another process later sets another TTL.

    Raises:
        InvalidArgument: a limit, TTL or name is invalid, or another object of this cache that is alive in this process
            has other limits. If the cache on the server has another number of shards, the first call raises this error.
    """

    _service = "tiered"

    def __init__(
        self,
        hot_size: int = _SIZES[0],
        warm_size: int = _SIZES[1],
        cold_size: int = _SIZES[2],
        hot_ttl: float | None = DefaultSeconds(300),
        warm_ttl: float | None = DefaultSeconds(1800),
        cold_ttl: float | None = DefaultSeconds(3600),
        *,
        name: str | None = None,
        backend: Backend | None = None,
        max_bytes: int | None = None,
        policy: Policy | str | None = None,
        strict: bool = False,
        local_size: int | None = None,
        local_bytes: int | None = None,
        codec: Codec | None = None,
        lease: float = DEFAULT_LEASE_S,
        shards: int | None = None,
        on_unavailable: WithoutServer | str = WithoutServer.COMPUTE,
    ) -> None:
        # A TTL of None means that entries do not expire. But in `given`, None means that the user chose no TTL. So
        # `given` holds infinity instead.
        ttls = [math.inf if ttl is None else ttl for ttl in (hot_ttl, warm_ttl, cold_ttl)]
        given = (policy, hot_size, warm_size, cold_size, max_bytes, *ttls, shards)
        sizes = {"hot_size": hot_size, "warm_size": warm_size, "cold_size": cold_size}
        off = all(type(size) is int and size == 0 for size in sizes.values())
        if off:  # sizes of 0 only turn this object off; the capacities of the cache stay
            given = (policy, None, None, None, max_bytes, *ttls, shards)
            sizes = dict(zip(sizes, _SIZES, strict=True))
        hot, warm, cold = (arguments.count(argument, size) for argument, size in sizes.items())
        capacities = (hot, warm, cold)
        settings = Settings(
            Policy.TINYLFU if policy is None else arguments.choice("policy", policy, Policy),
            capacities,
            0 if max_bytes is None else arguments.count("max_bytes", max_bytes, maximum=MAX_CACHE_BYTES),
            (
                default_ttl_ms("hot_ttl", hot_ttl),
                default_ttl_ms("warm_ttl", warm_ttl),
                default_ttl_ms("cold_ttl", cold_ttl),
            ),
            checked_shards(shards),
        )
        super().__init__(
            *(settings, given, name, backend, codec),
            strict=strict,
            local_size=local_size,
            local_bytes=local_bytes,
            lease=lease,
            on_unavailable=on_unavailable,
            off=off,
        )
        self.hot = TierView(self, Tier.HOT, 0 if off else hot, hot_ttl)
        self.warm = TierView(self, Tier.WARM, 0 if off else warm, warm_ttl)
        self.cold = TierView(self, Tier.COLD, 0 if off else cold, cold_ttl)
        self._aio = AsyncTieredCache(self._backend, self._flows, self._maintenance)

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
        if_version: int | None = None,
    ) -> bool:
        """Store a value.

        Args:
            key: any string.
            value: any value that `agentperf_redis.codec.codec.Codec.encode` accepts; reads return an equal value of the
                same type.
            priority: "hot", "warm" or "cold"; None lets the policy choose, and leaves an existing entry in its tier.
            ttl: TTL, seconds. None means the default of the entry's tier; `math.inf` means no expiry.
            tags: names by which the value can be invalidated.
            if_version: a version that `entry` returned. The value is stored only if the present value still has this
                version, so a newer value is never overwritten. 0 stores only if there is no value; None always stores.

        Returns:
            Whether the value was stored: False if it is larger than the whole cache, if the present value has another
            version, or if a lost connection leaves the result unknown.

        Raises:
            InvalidArgument: an argument is invalid; nothing was sent.
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        tier = chosen_tier(priority)
        return self._backend.run(self._flows.writer.put(key, value, ttl, tags, tier, if_version=if_version))

    def add(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store a value if the key has none. If several callers, in any processes, try at once, only one gets True.

        The arguments and errors are those of `put`.

        Returns:
            True if this call stored the value, even if its first reply was lost and the request was repeated. False
            otherwise, and also if a lost connection leaves the result unknown.
        """
        tier = chosen_tier(priority)
        return self._backend.run(self._flows.writer.put_in_mode(Mode.ADD, key, value, ttl, tags, tier))

    def replace(
        self,
        key: str,
        value: Any,
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store a value if the key has one. The arguments and errors are those of `put`.

        Returns:
            Whether the value was stored. Also False if a lost connection leaves the result unknown.
        """
        tier = chosen_tier(priority)
        return self._backend.run(self._flows.writer.put_in_mode(Mode.REPLACE, key, value, ttl, tags, tier))

    def put_many(
        self,
        values: Mapping[str, Any],
        priority: Tier | str | None = None,
        *,
        ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> StoredCount:
        """Store several values, with one round trip per 256 values.

        Returns:
            The number of values stored, an int. Its attribute `refused` has the keys whose values were not stored. If a
            reply was lost, `refused` may also have keys whose values were stored.
        """
        return self._backend.run(self._flows.writer.put_many(values, ttl, tags, chosen_tier(priority)))

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """Return one dict for each tier, with the items of `LRUCache.get_stats`; `stats` returns more."""
        return self.stats().render_tiers()
