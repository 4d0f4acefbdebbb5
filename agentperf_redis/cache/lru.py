"""`LRUCache`: a single tier, from which the least recently used entry is evicted first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.async_client import AsyncLRUCache
from agentperf_redis.cache.client import MAX_CACHE_BYTES
from agentperf_redis.cache.commands import Mode
from agentperf_redis.cache.decorator import DecoratingCache
from agentperf_redis.cache.flows.single_flight import DEFAULT_LEASE_S
from agentperf_redis.cache.model import (
    TIERS_OWN_TTL_MS,
    CacheEntry,
    DefaultCount,
    Policy,
    Settings,
    StoredCount,
    WithoutServer,
    checked_shards,
    default_ttl_ms,
)
from agentperf_redis.codec.codec import Codec
from agentperf_redis.errors import InvalidArgument

_MAX_SIZE = 1000
"""Default maximum number of entries."""


class LRUCache(DecoratingCache):
    """A bounded cache shared by all processes, which evicts the least recently used entry first.

    A read costs one plain command. Reads are reported to the server with the next put, or after 0.2 s; see `flush`. If
    one process uses the cache, entries are evicted in exact LRU order. If several processes use it, the order may lag
    by the delay of the reports; with `strict` it is exact.

    Args:
        max_size: maximum number of entries. 0 switches this object off: reads are misses, nothing is stored, and each
            caller computes its own value, all without the server. Only `delete`, `clear`, `invalidate_tags` and `pop`
            are still sent, because the cache may be on in other processes. A put here does not replace the value that
            those processes read. Methods that describe the whole cache, such as `keys` and `stats`, still read it.
        default_ttl: TTL, in seconds, of entries put without a TTL. None is the cache's default, which is no expiry if
            no process has set it. `math.inf` is no expiry.
        name: name of the cache. All objects of this name, in all processes, are the same cache. By default, the cache
            is named after the place in the code where the object is made. For example, ``users = LRUCache()`` in the
            module app makes a cache named ``app.users``.
        backend: the server and namespace; by default the process-wide one.
        max_bytes: maximum total size, in bytes, of all keys and values; None is no limit. Beyond the limit, the
            server keeps popped values, and the short replies of `add`, `replace`, `incr`, `touch` and
            ``put(if_version=)``, until the deadline of their call.
        policy: which entry is evicted when the cache is full.
        strict: whether to record each read at once, with one script call per read.
        local_size: maximum number of local copies in this process; None is no local copies. A hit in a local copy costs
            no round trip. For up to 0.25 s after another process has changed a value, a hit may return the old value.
        local_bytes: maximum total size, in bytes, of the keys and values of the local copies.
        codec: encodes and decodes values.
        lease: seconds for which waiters are delayed if the process that computes their value crashes. A live process
            renews its lease, no matter how long it computes.
        shards: number of shards among which the entries are divided, a power of two up to 256. On a Cluster, each shard
            has a slot of its own, so the shards spread over the nodes. A shard evicts independently of the others, and
            has its share of the limits: at least 250 entries, and ``max_bytes / shards`` bytes, which is also the
            limit of a single value. None keeps the cache's number; a new cache gets 1. Operations on several keys are
            atomic only within each shard. An invalidation is acknowledged when all shards have received it.
        on_unavailable: what happens while the server is unreachable. "compute": `get_or_compute` and decorated
            functions return a stale local copy if `FreshnessOptions` allow it; otherwise they call the function, once
            per process; all other methods raise BackendUnavailable. "raise": all methods raise it. "miss":
            `get_or_compute` and decorated functions do as with "compute"; `get`, `get_many`, `entry`, `ttl` and `pop`
            find nothing; `put`, `add`, `replace`, `touch` and `put_many` store nothing; `delete`, `delete_many`,
            `clear` and `invalidate_tags` raise no error, and are sent before the next call that reaches the server.
            Only `incr`, `warm_up`, `sweep`, `flush` and methods that describe the whole cache still raise. After the
            outage, reads return the older value of any key that could not be written.

    If an option is not given, its present value stays, whichever process has set it. A new cache gets the
    defaults. A given option that differs from the present value applies to every process from then on, and a warning is
    logged. A given TTL always applies to the puts of this object, even if another process later sets another TTL.

    Raises:
        InvalidArgument: a limit, TTL or name is invalid, or another live object of this cache in this process has other
            limits. If the cache has another number of shards, the first call raises this error.
    """

    _service = "cache"

    def __init__(
        self,
        max_size: int = DefaultCount(_MAX_SIZE),
        default_ttl: float | None = None,
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
        self._max_size = arguments.count("max_size", max_size, minimum=0)
        self._default_ttl = default_ttl
        # max_size=0 turns only this object off. It does not change the size of the shared cache.
        capacity = self._max_size or DefaultCount(_MAX_SIZE)
        given = (
            policy,
            None,
            None,
            max_size if self._max_size else capacity,
            max_bytes,
            None,
            None,
            default_ttl,
            shards,
        )
        settings = Settings(
            Policy.LRU if policy is None else arguments.choice("policy", policy, Policy),
            (0, 0, capacity),
            0 if max_bytes is None else arguments.count("max_bytes", max_bytes, maximum=MAX_CACHE_BYTES),
            (0, 0, default_ttl_ms("default_ttl", default_ttl)),
            checked_shards(shards),
        )
        super().__init__(
            *(settings, given, name, backend, codec),
            strict=strict,
            local_size=local_size,
            local_bytes=local_bytes,
            lease=lease,
            on_unavailable=on_unavailable,
            off=not self._max_size,
        )
        self._aio = AsyncLRUCache(self._backend, self._flows, self._maintenance)

    @property
    def max_size(self) -> int:
        """The maximum number of entries. An assigned value applies to all processes from the next call on."""
        return self._max_size

    @max_size.setter
    def max_size(self, value: int) -> None:
        if not self._max_size:
            if arguments.count("max_size", value, minimum=0):
                raise InvalidArgument("max_size", value, "0, since this object was made with max_size=0 and is off")
            return
        size = arguments.count("max_size", value)
        self._shared_state.change("max_size", str(size))
        self._max_size = size

    @property
    def default_ttl(self) -> float | None:
        """TTL, in seconds, of entries that this object puts without a TTL. An assigned value applies to later puts."""
        return self._default_ttl

    @default_ttl.setter
    def default_ttl(self, value: float | None) -> None:
        own = TIERS_OWN_TTL_MS if value is None else default_ttl_ms("default_ttl", value)
        self._default_ttl = value
        self._flows.writer.use_ttls((own,) * 3)

    @property
    def aio(self) -> AsyncLRUCache:
        """The same methods for asyncio."""
        return self._aio

    def put(
        self,
        key: str,
        value: Any,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        if_version: int | None = None,
    ) -> bool:
        """Store a value.

        Args:
            key: any string.
            value: any value that `agentperf_redis.codec.codec.Codec.encode` accepts; reads return an equal value of the
                same type.
            ttl: TTL, seconds; None is the cache's default, `math.inf` is no expiry.
            tags: names by which the value can be invalidated.
            if_version: store only if the present value has this version, as `entry` returned it; 0 stores only if there
                is no value. So a newer value is never overwritten. None stores in any case.

        Returns:
            Whether the value was stored: False if it is larger than the whole cache, if the present value has another
            version, or if a lost connection leaves the result unknown.

        Raises:
            InvalidArgument: an argument is invalid; nothing was sent.
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.writer.put(key, value, ttl, tags, if_version=if_version))

    def add(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value if the key has none. If callers in several processes add it, only one gets True.

        The arguments and errors are those of `put`.

        Returns:
            Whether this call stored the value, even if its first reply was lost. Also False if a lost connection leaves
            the result unknown.
        """
        return self._backend.run(self._flows.writer.put_in_mode(Mode.ADD, key, value, ttl, tags))

    def replace(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value if the key has one. The arguments and errors are those of `put`.

        Returns:
            Whether the value was stored. Also False if a lost connection leaves the result unknown.
        """
        return self._backend.run(self._flows.writer.put_in_mode(Mode.REPLACE, key, value, ttl, tags))

    def put_many(self, values: Mapping[str, Any], ttl: float | None = None, *, tags: Iterable[str] = ()) -> StoredCount:
        """Store several values, in one round trip for each 256 values.

        Returns:
            The number of values stored, an int. Its attribute `refused` has the keys whose values were not stored. If a
            reply was lost, `refused` may also have keys whose values were stored.
        """
        return self._backend.run(self._flows.writer.put_many(values, ttl, tags))

    def get_stats(self) -> dict[str, Any]:
        """Return size, max_size, hits, misses, hit_rate (text) and total_requests; `stats` returns more."""
        return self.stats().render()

    @property
    def cache(self) -> dict[str, CacheEntry]:
        """The present entries, by the keys that `keys` returns. For inspection: each use reads the whole cache."""
        entries = ((key, self.entry(key)) for key in self.keys())
        return {key: entry for key, entry in entries if entry is not None}

    @property
    def access_order(self) -> list[str]:
        """All keys, the least recently used first."""
        return self.keys()
