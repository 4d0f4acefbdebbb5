"""The common base of `LRUCache` and `TieredCache`; `async_client` has the same methods for asyncio."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from inspect import CO_COROUTINE
from typing import Any, TypeVar, Unpack, overload

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.cache.async_client import AsyncCache
from agentperf_redis.cache.compute import compute, wanted
from agentperf_redis.cache.flows import CacheFlows, inspection
from agentperf_redis.cache.flows.access_reports import flush_all
from agentperf_redis.cache.flows.reads import MISSING
from agentperf_redis.cache.flows.single_flight import MIN_LEASE_S
from agentperf_redis.cache.freshness import FreshnessOptions
from agentperf_redis.cache.history import CacheSeriesRow
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.model import TIERS_OWN_TTL_MS, CacheEntry, CacheStats, Settings, WithoutServer, chosen
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.cache.scanning import DEFAULT_BATCH, KeyPages, KeyScan
from agentperf_redis.cache.warm_up import DEFAULT_CONCURRENCY, OnProgress, WarmUpStatus, each_wanted, warm
from agentperf_redis.codec.codec import Codec
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.place import place_of
from agentperf_redis.windows import Timestamp, Window

R = TypeVar("R")

_LOCAL_SIZE = 10_000
"""Maximum number of local copies if only `local_bytes` is given."""
MAX_CACHE_BYTES = 10**15
"""Maximum of `max_bytes` and `local_bytes`. It exceeds any server's memory. Small multiples of it are exact doubles."""


class Cache(ABC):
    """The common base of `LRUCache` and `TieredCache`."""

    _service: str

    def __init__(
        self,
        settings: Settings,
        given: Sequence[object],
        name: str | None,
        backend: Backend | None,
        codec: Codec | None,
        *,
        strict: bool,
        local_size: int | None,
        local_bytes: int | None,
        lease: float,
        on_unavailable: WithoutServer | str,
        off: bool = False,
    ) -> None:
        marks = "".join("1" if chosen(option) else "0" for option in given)
        if not off:
            settings.check_shards(self._service)
        self._backend = chosen_backend(backend)
        place = place_of(self, self._backend.process) if name is None else None
        name = self.name = arguments.name("name", name) if place is None else place.name
        maintenance = self._backend.share("cache maintenance", lambda: Maintenance(self._backend))
        self._shared_state = self._backend.share(
            ("cache", self._service, name),
            lambda: SharedState(
                *(self._backend, self._service, name, settings, marks, maintenance.report_soon, maintenance.used)
            ),
        )
        try:
            self._shared_state.adopt(self, settings, marks, off=off)
        except InvalidArgument:
            gc.collect()  # reference cycles may keep unused objects of this cache alive
            try:
                self._shared_state.adopt(self, settings, marks, off=off)
            except InvalidArgument as refused:
                raise refused from None  # the first refusal has the same text
        if place is not None:
            place.warn(f"{type(self).__name__}()", self._shared_state.users)
        self._maintenance = maintenance
        local = None
        if local_size is not None or local_bytes is not None:
            if arguments.flag("strict", strict):
                raise InvalidArgument("strict", strict, "False with local copies, whose reads are reported later")
            limits = (
                _LOCAL_SIZE if local_size is None else arguments.count("local_size", local_size),
                None if local_bytes is None else arguments.count("local_bytes", local_bytes, maximum=MAX_CACHE_BYTES),
            )
            local = None if off else self._shared_state.use_local(*limits)
        self._flows = CacheFlows(
            self._shared_state,
            Codec() if codec is None else _checked_codec(codec),
            strict=arguments.flag("strict", strict),
            own_ttls_ms=_own_ttls(settings, given),
            local=local,
            lease_ms=round(arguments.seconds("lease", lease, minimum=MIN_LEASE_S) * 1000),
            on_unavailable=arguments.choice("on_unavailable", on_unavailable, WithoutServer),
            off=off,
        )
        self._local = local

    def __repr__(self) -> str:
        settings = "off" if self._flows.off else self._shared_state.settings.shown(self._service)
        return f"{type(self).__name__}({self.name!r}, {settings})"

    def __len__(self) -> int:
        return self.size()

    def __bool__(self) -> bool:
        """Return True, even for an empty cache, so that ``cache or LRUCache()`` returns the cache. Does no I/O."""
        return True

    def size(self) -> int:
        """Return the number of entries, as ``len(cache)`` does. The asyncio client supports `size`, but not ``len``.

        An expired entry counts until it is swept. An entry invalidated by tag counts until it is overwritten, expires,
        is evicted or is swept.
        """
        return self._backend.run(inspection.size(self._flows.shared))

    def get(self, key: str, default: Any = None, *, fresh: bool = False) -> Any:
        """Return the value of a key, or the default.

        A read costs one command, whatever the tier of the entry. A read that a local copy answers costs no command.

        Args:
            key: any string.
            default: returned when there is no value; a cached None is a value.
            fresh: True reads from the server even if there is a local copy.

        Raises:
            InvalidArgument: the key is not a string, or cannot be encoded.
            BackendUnavailable: the server did not answer.
        """
        local = self._local
        if local is not None and not fresh:
            copy = local.find(key)
            if copy is not None:
                if copy.frozen:
                    return copy.value
                value = self._flows.reader.unpacked(copy)
                if value is not MISSING:
                    return value
        return self._backend.run(self._flows.reader.get(key, default))

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> dict[str, Any]:
        """Return a dict of the keys that have a value, with their values.

        Sends one command for every 256 keys. With several shards, it sends one command for each shard concerned, in one
        pipeline for each node.
        """
        return self._backend.run(self._flows.reader.get_many(keys, fresh=fresh))

    def entry(self, key: str) -> CacheEntry | None:
        """Return the value and the metadata of a key, or None if it has no value. This does not count as a read."""
        return self._backend.run(self._flows.reader.entry(key))

    def ttl(self, key: str) -> float | None:
        """Return the seconds until a value expires: `math.inf` for never, None if there is no value.

        This does not count as a read.
        """
        return self._backend.run(self._flows.reader.ttl(key))

    def touch(self, key: str, ttl: float | None = None) -> bool:
        """Give a value another TTL, counted from now. The value keeps its version.

        An expired or invalidated value stays a miss. For the order of eviction, this counts as a write.

        Args:
            key: any string.
            ttl: TTL, seconds; None is the cache's default, `math.inf` is no expiry.

        Returns:
            Whether there was a value. Also False if a lost connection leaves the result unknown.

        Raises:
            BackendUnavailable: the server did not answer.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.writer.touch(key, ttl))

    def incr(
        self, key: str, by: int = 1, *, ttl: float | None = None, tags: Iterable[str] = (), create: bool = True
    ) -> int:
        """Add to a stored integer, in one step for all processes. The value keeps its TTL and its tags.

        If there is no value, `by` is stored, as if the value had been 0. The addition is made once, even if the reply
        is lost and the request is sent again.

        Args:
            key: any string.
            by: an integer between -2^53 and 2^53; a negative one subtracts.
            ttl: TTL of a value that did not exist, seconds; None is the cache's default, `math.inf` is no expiry.
            tags: tags of a value that did not exist.
            create: whether `by` is stored if there is no value.

        Returns:
            The new value.

        Raises:
            InvalidArgument: an argument is invalid, and nothing was sent; or the new number does not fit into the
                cache's `max_bytes`, and the old value stays.
            NoInteger: the stored value or the sum is not an integer between -2^53 and 2^53; or there is no value, and
                `create` is False. Nothing was changed.
            BackendUnavailable: the server did not answer, whatever `on_unavailable` is. Its `outcome` says whether the
                addition may have been made.
            BackendFull: the server is at its memory limit.
        """
        return self._backend.run(self._flows.writer.increment(key, by, ttl, tags, create))

    def pop(self, key: str, default: Any = None) -> Any:
        """Return the value of a key and remove it. If callers in several processes pop it, only one gets the value.

        This counts as a read. If the value is being computed now, the result will not be stored. The server keeps the
        popped value until the deadline of the call, but this value does not count towards `max_bytes`. A value that
        this process cannot decode is also removed.

        Args:
            key: any string.
            default: returned when there is no value, or none that can be decoded; a cached None is a value.

        Raises:
            BackendUnavailable: the server did not answer. Its `outcome` says whether the value may have been removed.
        """
        return self._backend.run(self._flows.eraser.pop(key, default))

    @property
    @abstractmethod
    def aio(self) -> AsyncCache:
        """The same methods for asyncio."""

    @abstractmethod
    def put(self, key: str, value: Any, *, ttl: float | None = None, tags: Iterable[str] = ()) -> bool:
        """Store a value; see `LRUCache.put` and `TieredCache.put`."""

    def delete(self, key: str) -> bool:
        """Remove a key. If its value is being computed now, the result will not be stored.

        Returns:
            Whether there was a value.
        """
        return self._backend.run(self._flows.eraser.delete(key))

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove keys as `delete` does. With several shards, the keys of each shard are removed in one step.

        Returns:
            The number of keys that had a value.
        """
        return self._backend.run(self._flows.eraser.delete_many(keys))

    def clear(self) -> None:
        """Make every key a miss, at once and at a cost independent of the number of entries.

        With several shards, each shard is cleared in one step. When this method returns, all shards are cleared.
        """
        self._backend.run(self._flows.eraser.clear())

    def invalidate_tags(self, *tags: str) -> None:
        """Invalidate, at once, every entry that was stored with one of the tags. Reads of these entries are misses.

        The cost does not depend on the number of entries, since the entries are not touched. An invalidated entry uses
        capacity, and counts in `size` and `keys`, until it is overwritten, expires, is evicted or is swept; see
        `sweep`. With several shards, a read may return an old value until this method returns, but not later.
        """
        self._backend.run(self._flows.eraser.invalidate_tags(tags))

    def sweep(self) -> int:
        """Remove entries that are expired, cleared, dropped by the server, or invalidated by tag.

        Puts also remove expired and cleared entries, a few at a time. A sweep removes the entries of all four kinds
        now. Its steps are short, so other callers are not blocked.

        Returns:
            The number of removed entries and values. A cleared entry counts when its value is removed.
        """
        return self._backend.run(self._flows.eraser.sweep())

    def flush(self) -> None:
        """Report buffered reads to the server now. Without this call, they are reported within 0.2 s.

        With more than 4 shards, they are reported within 0.05 s times the number of shards, but at most 5 s.
        """
        self._backend.run(flush_all(self._flows.shared))

    def stats(self) -> CacheStats:
        """Return the statistics of all processes together, including the latest reads of this process."""
        return self._backend.run(inspection.stats(self._flows.shared))

    def series(
        self, *, window: Window = "1h", step: Window = "1m", as_of: Timestamp = None
    ) -> tuple[CacheSeriesRow, ...]:
        """Return the history of this cache, for all processes together: one row for each step, oldest first.

        While processes use the cache, one of them samples it every ten seconds. Slices of 10 s are kept for 15 minutes,
        slices of 1 min for 3 hours, and slices of 1 h for 8 days.

        Args:
            window: length of the window, in seconds or as ``"5m"``, ``"1h"``, ``"3d"``.
            step: length of a step, in the same form: a multiple of ten seconds, at most the window, and at least
                1/2000 of the window. Steps begin at multiples of their length since 1970 (UTC).
            as_of: end of the window: a datetime (local time if it has no zone), or seconds since 1970; None for now.

        Raises:
            InvalidArgument: an argument is invalid, or slices as narrow as the step are not kept for the whole window.
        """
        return self._backend.run(inspection.series(self._flows.shared, window, step, as_of))

    def keys(self) -> list[str]:
        """Return all keys that use capacity (see `size`), the least recently accessed first.

        Reads are reported with a delay, so two keys of different shards may be in the wrong order.

        A key longer than 4 KiB appears as its first 40 characters and a hash. Every method accepts this name as a key.
        """
        return self._backend.run(inspection.oldest_first(self._flows.shared))

    def scan(self, *, match: str | None = None, batch: int = DEFAULT_BATCH) -> KeyScan:
        """Iterate over the keys, in no order, one batch at a time. This suits caches of any size.

        A key that is in the cache during the whole scan is returned at least once. Other keys may be missed or
        returned. A key may be returned twice. The scan covers the keys that `keys` returns, including invalidated ones.

        Args:
            match: return only keys that match this pattern: ``*`` is any text, ``?`` any character, ``[ab]`` one of
                these characters, as in `fnmatch.fnmatchcase`. The server reads all keys, whatever the pattern.
            batch: keys that the server examines at a time, 1 to 10,000. A small cache is read at once.
        """
        return KeyScan(self._backend, KeyPages(self._flows.shared, match, batch))

    @overload
    def get_or_compute(
        self,
        key: str,
        function: Callable[[], R],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> R: ...
    @overload
    def get_or_compute(
        self,
        key: str,
        function: Callable[[], Any],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> Any: ...
    def get_or_compute(
        self,
        key: str,
        function: Callable[[], Any],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        **freshness: Unpack[FreshnessOptions],
    ) -> Any:
        """Return the value of a key. If it is missing, one caller among all processes computes it, and the others wait.

        A value that cannot be stored is returned uncached: all callers of a process that wait for it get the same
        object. During an outage, the cache's option `on_unavailable` applies.

        Args:
            key: any string.
            function: computes the value.
            ttl: TTL, seconds; None is the cache's default, `math.inf` is no expiry.
            tags: names by which the value can be invalidated.
            freshness: when the value is refreshed in the background; see `FreshnessOptions`.

        Raises:
            ComputeFailed: another process computed the value, and the function raised an error there.
            BackendUnavailable: the server does not answer, and the cache was made with on_unavailable="raise".
        """
        _refuse_coroutines("get_or_compute", function)
        request = wanted(key, function, ttl, tags, freshness)
        return compute(self._backend, self._flows, self._maintenance, request)

    def warm_up(
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
        """Compute the values that are missing for the given keys, as `get_or_compute` does, but several at a time.

        Several processes may warm the same keys at once: no value is computed twice. If the function raises for a key,
        the values of the other keys are still computed. The exception is in the `errors` of the result.

        Args:
            items: the keys; the iterable is consumed as needed.
            function: computes the value of a key; called from several threads at a time.
            ttl: TTL of each value, seconds; None is the cache's default, `math.inf` is no expiry.
            tags: names by which the values can be invalidated.
            concurrency: maximum number of values computed at a time.
            progress: called with a `WarmUpStatus` after each value, on the thread that computed the value. Calls never
                overlap.
            freshness: when the values are refreshed; see `FreshnessOptions`.

        Raises:
            BackendUnavailable: the server does not answer, so no value would be stored.
        """
        _refuse_coroutines("warm_up", function)
        request = each_wanted(items, function, ttl, tags, concurrency, progress, freshness)
        return warm(self._backend, self._flows, self._maintenance, *request, progress)

    @property
    def hits(self) -> int:
        """Hits of all processes."""
        return self.stats().hits

    @property
    def misses(self) -> int:
        """Misses of all processes."""
        return self.stats().misses


def _refuse_coroutines(method: str, function: object) -> None:
    """Refuse a coroutine function in a blocking call.

    This checks a flag of the function's code, since `inspect.iscoroutinefunction` takes three times as long.
    """
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & CO_COROUTINE:
        raise InvalidArgument("function", function, f"a blocking function; .aio.{method} takes coroutine functions")


def _checked_codec(codec: object) -> Codec:
    if not isinstance(codec, Codec) or any(map(arguments.is_coroutine_function, (codec.encode, codec.decode))):
        raise InvalidArgument("codec", codec, "a Codec whose encode and decode are blocking methods, or None")
    return codec


def _own_ttls(settings: Settings, given: Sequence[object]) -> tuple[int, int, int]:
    """Return the TTLs for puts of a cache object: those given to its constructor, or else the tiers' defaults.

    If cold is the only tier, its TTL is returned for all tiers.
    """
    hot, warm, cold = (
        ms if chosen(option) else TIERS_OWN_TTL_MS for ms, option in zip(settings.ttls_ms, given[5:8], strict=True)
    )
    return (hot, warm, cold) if any(settings.capacities[:2]) else (cold,) * 3
