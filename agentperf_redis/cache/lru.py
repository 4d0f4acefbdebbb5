"""`LRUCache`: a single tier, from which the least recently used entry is evicted first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.async_client import AsyncLRUCache
from agentperf_redis.cache.client import MAX_CACHE_BYTES
from agentperf_redis.cache.decorator import DecoratingCache
from agentperf_redis.cache.flows.single_flight import DEFAULT_LEASE_S
from agentperf_redis.cache.model import (
    TIERS_OWN_TTL_MS,
    CacheEntry,
    DefaultCount,
    Policy,
    Settings,
    WithoutServer,
    default_ttl_ms,
)
from agentperf_redis.codec.codec import Codec


class LRUCache(DecoratingCache):
    """A bounded cache shared by all processes, which evicts the least recently used entry first.

    A read costs one plain command. Reads are reported with the next put, or after 0.2 s. Within one process entries are
    evicted in exact LRU order. Among several processes the order is exact to that delay, or exact with `strict`.

    Args:
        max_size: entries it holds.
        default_ttl: TTL of entries put without one, seconds; None is the cache's default (no expiry if no process has
            set one); `math.inf` is no expiry.
        name: of the cache; every object of that name in any process is the same cache.
        backend: the server and namespace; by default the process-wide one.
        max_bytes: bytes of all keys and values together; None is no limit.
        policy: which entry is evicted when it is full.
        strict: record each read at once, with one script call per read.
        local_size: number of local copies in this process, where a hit costs no round trip; None is no local copies. A
            value that another process has changed may be read from there for up to 0.25 s.
        local_bytes: bytes of their keys and values together.
        codec: encodes and decodes values.
        lease: seconds for which a process that crashes while it computes a value delays the waiters. A live process
            renews its lease, no matter how long it computes.
        on_unavailable: while the server is unreachable, "compute" calls the functions of `get_or_compute` and of
            decorated functions, once per process, unless a stale local copy is allowed (see `FreshnessOptions`);
            "raise" raises BackendUnavailable there, as all other methods do.

    Options that are not given keep the cache's present values, whichever process has set them; the defaults apply to a
    new cache. A given option that differs applies to every process from then on, which is logged as a warning. A given
    TTL applies to all puts of this object instead.

    Raises:
        InvalidArgument: for an invalid limit, TTL or name, or limits different from those of a live object of this
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
        lease: float = DEFAULT_LEASE_S,
        on_unavailable: WithoutServer | str = WithoutServer.COMPUTE,
    ) -> None:
        given = (policy, None, None, max_size, max_bytes, None, None, default_ttl)
        self._max_size = arguments.count("max_size", max_size)
        self._default_ttl = default_ttl
        settings = Settings(
            Policy.LRU if policy is None else arguments.choice("policy", policy, Policy),
            (0, 0, self._max_size),
            0 if max_bytes is None else arguments.count("max_bytes", max_bytes, maximum=MAX_CACHE_BYTES),
            (0, 0, default_ttl_ms("default_ttl", default_ttl)),
        )
        super().__init__(
            *(settings, given, name, backend, codec),
            strict=strict,
            local_size=local_size,
            local_bytes=local_bytes,
            lease=lease,
            on_unavailable=on_unavailable,
        )
        self._aio = AsyncLRUCache(self._backend, self._flows, self._maintenance)

    @property
    def max_size(self) -> int:
        """The maximum number of entries. A new value applies to every process from this one's next write on."""
        return self._max_size

    @max_size.setter
    def max_size(self, value: int) -> None:
        self._max_size = arguments.count("max_size", value)
        self._shared_state.change("max_size", str(self._max_size))

    @property
    def default_ttl(self) -> float | None:
        """TTL of entries put by this object without one, seconds; see the class. A new value applies to later puts."""
        return self._default_ttl

    @default_ttl.setter
    def default_ttl(self, value: float | None) -> None:
        own = TIERS_OWN_TTL_MS if value is None else default_ttl_ms("default_ttl", value)
        self._default_ttl = value
        self._flows.writer.use_ttls((TIERS_OWN_TTL_MS, TIERS_OWN_TTL_MS, own))

    @property
    def aio(self) -> AsyncLRUCache:
        """The same methods for asyncio."""
        return self._aio

    def put(self, key: str, value: Any, ttl: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value.

        Args:
            key: any string.
            value: see `agentperf_redis.codec.codec.Codec.encode`; it comes back equal and of the same type.
            ttl: TTL, seconds; None is the cache's default, `math.inf` is no expiry.
            tags: names by which it can be invalidated.

        Returns:
            Whether it was stored: False if it is larger than the whole cache, or if unknown after a lost connection.

        Raises:
            InvalidArgument: an argument is invalid; nothing was sent.
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.writer.put(key, value, ttl, tags))

    def put_many(self, values: Mapping[str, Any], ttl: float | None = None, *, tags: Iterable[str] = ()) -> int:
        """Store several values, in one round trip for each 256 values.

        Returns:
            The number of values stored.
        """
        return self._backend.run(self._flows.writer.put_many(values, ttl, tags))

    def get_stats(self) -> dict[str, Any]:
        """Return size, max_size, hits, misses, hit_rate (text) and total_requests; `stats` returns more."""
        return self.stats().render()

    @property
    def cache(self) -> dict[str, CacheEntry]:
        """All entries as they are now, by key. For inspection only: it reads the whole cache."""
        entries = ((key, self.entry(key)) for key in self.keys())
        return {key: entry for key, entry in entries if entry is not None}

    @property
    def access_order(self) -> list[str]:
        """All keys, the least recently used first."""
        return self.keys()
