"""Django's cache framework on an LRU cache that all processes share: `AgentPerfCache`.

``CACHES = {"default": {"BACKEND": "agentperf_redis.integrations.django.AgentPerfCache", "LOCATION": "redis://host"}}``

An integer of up to 64 bits is stored as it is, so that `incr` is one atomic step. Any other value is pickled, because
Django allows any object. So everyone who can write to the server can run code in the processes that read from it.
Entries are lost if a full cache evicts them, the least recently used first, or if the server loses its data.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.cache.async_client import AsyncLRUCache
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.errors import AgentPerfError, ComputeFailed, InvalidArgument, NoInteger
from agentperf_redis.extras import extra
from agentperf_redis.integrations._clients import CACHE_OPTIONS, MAX_VALUE_BYTES, CacheOfAdapter

with extra("django"):
    from asgiref.sync import sync_to_async
    from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
    from django.core.exceptions import SynchronousOnlyOperation

R = TypeVar("R")
Steps: TypeAlias = Generator[Callable[[Any], Any], Any, R]
"""A generator that yields functions. Each is called with the blocking or the asyncio API of the cache, and its result
is sent back."""

_log = logging.getLogger("agentperf_redis")

_MISSING = object()
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**64 - 1
"""Bounds of the integers that are stored as integers. All other values are pickled."""
_OPTIONS = ("name", "namespace", "MAX_ENTRIES", "CULL_FREQUENCY", *CACHE_OPTIONS)


class AgentPerfCache(BaseCache):  # type: ignore[misc,unused-ignore]  # the base is Any without Django
    """A cache backend for Django's setting CACHES.

    `TIMEOUT`, `VERSION`, `KEY_PREFIX` and `KEY_FUNCTION` have the same meaning as in Django; a timeout may be a
    fraction of a second. `LOCATION` is the URL of the server; without it, the environment variable AGENTPERF_REDIS_URL
    applies. The asyncio methods (`aget`, ...) use the event loop, not threads. `get_or_set` with a function computes a
    missing value once for all processes. `clear` empties the cache `name`, including entries with other prefixes.

    `OPTIONS`:
        name: the name of the cache in `agentperf cache list`, by default "django". Aliases with the same server and
            name share one cache and its limits. Different prefixes keep their keys apart.
        namespace: the prefix of all keys on the server; by default AGENTPERF_NAMESPACE, else "agentperf".
        MAX_ENTRIES: max entries of all processes together, by default 10,000. A full cache evicts one entry at a time,
            so CULL_FREQUENCY has no effect.
        on_unavailable: what happens while the server is unreachable. "miss": reads find nothing, and writes store
            nothing; only `incr` raises BackendUnavailable. By default, all methods raise BackendUnavailable, except
            that `get_or_set` with a function computes the value.
        max_bytes, policy, strict, local_size, local_bytes, lease: see `LRUCache`.

    As with memcached, a value whose pickled form is larger than 1 MiB is not stored. A log line reports this, and the
    older value of the key is removed.

    Args:
        location: the value of LOCATION.
        params: the other values of the alias.

    Raises:
        InvalidArgument: an option or the URL is invalid, or another alias with this name has other limits.
    """

    def __init__(self, location: str, params: Mapping[str, Any]) -> None:
        super().__init__(params)
        if not isinstance(location, str):
            allowed = "the URL of one server, such as redis://host:6379/0"
            raise InvalidArgument("LOCATION", type(location), allowed)  # not the value: it may contain passwords
        options = dict(params.get("OPTIONS", {}))
        for unknown in sorted(set(options).difference(_OPTIONS)):
            raise InvalidArgument("OPTIONS", unknown, "the names " + ", ".join(_OPTIONS))
        name, namespace = options.pop("name", "django"), options.pop("namespace", None)
        options.pop("CULL_FREQUENCY", None)
        if "MAX_ENTRIES" in options:
            options["max_size"] = arguments.count("MAX_ENTRIES", options.pop("MAX_ENTRIES"), minimum=0)
        self._shared = CacheOfAdapter(location or None, namespace, name, options)

    @property
    def cache(self) -> LRUCache:
        """The `LRUCache` that holds the entries. It has statistics and further methods."""
        return self._cache

    @property
    def _cache(self) -> LRUCache:
        return self._shared.current()

    def add(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Store a value if the key has none. Of concurrent callers in all processes, only one gets True."""
        return self._run(self._add(key, value, timeout, version))

    async def aadd(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See `add`."""
        return await self._arun(self._add(key, value, timeout, version))

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """Return the value of a key, or the default."""
        return _loaded(self._cache.get(self._key(key, version), _MISSING), default)

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """See `get`."""
        return _loaded(await self._cache.aio.get(self._key(key, version), _MISSING), default)

    def set(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """Store a value. If it cannot be stored, the older value is removed."""
        self._run(self._set(key, value, timeout, version))

    async def aset(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """See `set`."""
        await self._arun(self._set(key, value, timeout, version))

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give a value another timeout. Returns whether there was a value; an expired value stays expired."""
        return self._run(self._touch(key, timeout, version))

    async def atouch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See `touch`."""
        return await self._arun(self._touch(key, timeout, version))

    def delete(self, key: Any, version: int | None = None) -> bool:
        """Remove a key. Returns whether it had a value."""
        return self._cache.delete(self._key(key, version))

    async def adelete(self, key: Any, version: int | None = None) -> bool:
        """See `delete`."""
        return await self._cache.aio.delete(self._key(key, version))

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        """Return the values of the keys that have one, as a dict. Sends one command for every 256 keys."""
        return self._run(self._get_many(keys, version))

    async def aget_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        """See `get_many`."""
        return await self._arun(self._get_many(keys, version))

    def set_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """Store several values, in one round trip for every 256. Returns the keys whose values were not stored."""
        return self._run(self._set_many(data, timeout, version))

    async def aset_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """See `set_many`."""
        return await self._arun(self._set_many(data, timeout, version))

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """Remove several keys. Sends one command for every 256 keys."""
        self._cache.delete_many([self._key(key, version) for key in keys])

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """See `delete_many`."""
        await self._cache.aio.delete_many([self._key(key, version) for key in keys])

    def get_or_set(self, key: Any, default: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> Any:
        """Return the value of a key. If there is none, store and return `default`, or its result if it is callable.

        If several callers in any processes need the value at once, one of them calls its function, and the others wait
        for the result. If the function raises in another process, this process calls its own function. So its caller
        gets the original exception, not a ComputeFailed.
        """
        return self._run(self._get_or_set(key, default, timeout, version))

    async def aget_or_set(
        self, key: Any, default: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any:
        """See `get_or_set`. As in Django, `default` must not be a coroutine function."""
        return await self._arun(self._get_or_set(key, default, timeout, version))

    def has_key(self, key: Any, version: int | None = None) -> bool:
        """Return whether a key has a value."""
        return self._cache.get(self._key(key, version), _MISSING) is not _MISSING

    async def ahas_key(self, key: Any, version: int | None = None) -> bool:
        """See `has_key`."""
        return await self._cache.aio.get(self._key(key, version), _MISSING) is not _MISSING

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        """Add to an integer in one atomic step. The value keeps its timeout.

        Raises:
            ValueError: the key has no value.
            NoInteger: the value or the sum is not an integer between -2^53 and 2^53. NoInteger is a TypeError.
            BackendUnavailable: the server did not answer. This does not depend on `on_unavailable`.
        """
        return self._run(self._incr(key, delta, version))

    async def aincr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        """See `incr`."""
        return await self._arun(self._incr(key, delta, version))

    def clear(self) -> None:
        """Make every key of the cache a miss. The cost does not depend on the number of keys."""
        self._cache.clear()

    async def aclear(self) -> None:
        """See `clear`."""
        await self._cache.aio.clear()

    def _run(self, steps: Steps[R]) -> R:
        """Run the steps with the blocking API of the cache."""
        proceed: Callable[[Any], Callable[[Any], Any]] = steps.send
        answer: Any = None
        try:
            while True:
                step = proceed(answer)
                try:
                    proceed, answer = steps.send, step(self._cache)
                except AgentPerfError as error:
                    proceed, answer = steps.throw, error
        except StopIteration as done:
            return cast("R", done.value)

    async def _arun(self, steps: Steps[R]) -> R:
        """Run the steps with the asyncio API of the cache."""
        proceed: Callable[[Any], Callable[[Any], Any]] = steps.send
        answer: Any = None
        while True:
            try:
                step = proceed(answer)
            except StopIteration as done:
                return cast("R", done.value)
            try:
                proceed, answer = steps.send, await step(self._cache.aio)
            except AgentPerfError as error:
                proceed, answer = steps.throw, error

    def _key(self, key: Any, version: int | None) -> str:
        return cast("str", self.make_and_validate_key(key, version=version))

    def _ttl(self, timeout: Any) -> float:
        """Return the TTL for a timeout in Django's sense: `math.inf` for None, 0.0 for a value that expires at once."""
        if timeout is DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        if timeout is None:
            return math.inf
        return 0.0 if timeout <= 0 else min(max(float(timeout), 0.001), arguments.MAX_SECONDS)

    def _add(self, key: Any, value: Any, timeout: Any, version: int | None) -> Steps[bool]:
        name, ttl = self._key(key, version), self._ttl(timeout)
        stored = yield lambda cache: _dumped_for(cache, value)
        if ttl and _fits(key, stored):
            added: bool = yield lambda cache: cache.add(name, stored, ttl)
            return added
        return not ttl and (yield lambda cache: cache.get(name, _MISSING)) is _MISSING

    def _set(self, key: Any, value: Any, timeout: Any, version: int | None) -> Steps[None]:
        name, ttl = self._key(key, version), self._ttl(timeout)
        stored = yield lambda cache: _dumped_for(cache, value)
        if not (ttl and _fits(key, stored) and (yield lambda cache: cache.put(name, stored, ttl))):
            yield lambda cache: cache.delete(name)

    def _touch(self, key: Any, timeout: Any, version: int | None) -> Steps[bool]:
        name, ttl = self._key(key, version), self._ttl(timeout)
        found: bool = yield lambda cache: cache.touch(name, ttl) if ttl else cache.delete(name)
        return found

    def _get_many(self, keys: Iterable[Any], version: int | None) -> Steps[dict[Any, Any]]:
        names = {self._key(key, version): key for key in keys}
        found = yield lambda cache: cache.get_many(names)
        return {names[name]: _loaded(stored, None) for name, stored in found.items()}

    def _set_many(self, data: Mapping[Any, Any], timeout: Any, version: int | None) -> Steps[list[Any]]:
        ttl = self._ttl(timeout)
        names = {self._key(key, version): key for key in data}
        values = {}
        for name, key in names.items():
            values[name] = yield partial(_dumped_for, value=data[key])
        unfit = [name for name, stored in values.items() if not _fits(names[name], stored)]
        for name in names if not ttl else unfit:
            del values[name]
        refused = (yield lambda cache: cache.put_many(values, ttl)).refused if values else ()
        gone = [name for name in names if name not in values or name in set(refused)]
        if gone:
            yield lambda cache: cache.delete_many(gone)
        return [names[name] for name in (*unfit, *refused)]

    def _get_or_set(self, key: Any, default: Any, timeout: Any, version: int | None) -> Steps[Any]:
        name, ttl = self._key(key, version), self._ttl(timeout)
        if callable(default) and ttl:
            try:
                return _loaded(
                    (yield lambda cache: cache.get_or_compute(name, _computing(cache, key, default), ttl)), None
                )
            except _Unfit as computed:
                return computed.value
            except ComputeFailed:  # another process's function raised an error: call this caller's function
                pass
        stored = yield lambda cache: cache.get(name, _MISSING)
        if stored is not _MISSING:
            return _loaded(stored, None)
        value = default() if callable(default) else default
        yield from self._add(key, value, timeout, version)
        # Return the stored value: another caller may have stored its value first.
        return _loaded((yield lambda cache: cache.get(name, _MISSING)), value)

    def _incr(self, key: Any, delta: int, version: int | None) -> Steps[int]:
        name = self._key(key, version)
        try:
            value: int = yield lambda cache: cache.incr(name, delta, create=False)
            return value
        except NoInteger:
            if (yield lambda cache: cache.get(name, _MISSING)) is _MISSING:
                raise ValueError(f"Key {key!r} not found") from None
            raise


def _dumped(value: Any) -> int | bytes:
    """Return the stored form of a value."""
    if type(value) is int and _MIN_INTEGER <= value <= _MAX_INTEGER:
        return value
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def _dumped_for(cache: LRUCache | AsyncLRUCache, value: Any) -> Any:
    """Return the stored form of a value; for the asyncio API, an awaitable of it."""
    return _adumped(value) if isinstance(cache, AsyncLRUCache) else _dumped(value)


async def _adumped(value: Any) -> int | bytes:
    try:
        return _dumped(value)
    except SynchronousOnlyOperation:  # the value is a query set, which reads from the database when it is pickled
        stored: int | bytes = await sync_to_async(_dumped)(value)
        return stored


class _Unfit(AgentPerfError):
    """A computed value cannot be stored. The error carries the value to all waiting callers in this process."""

    def __init__(self, value: Any) -> None:
        super().__init__("the value is too large")
        self.value = value


def _computing(cache: LRUCache | AsyncLRUCache, key: Any, default: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function that makes the stored form of a missing value; for the asyncio API, a coroutine function."""

    def checked(value: Any, stored: int | bytes) -> int | bytes:
        if not _fits(key, stored):
            raise _Unfit(value)
        return stored

    def compute() -> int | bytes:
        value = default()
        return checked(value, _dumped(value))

    async def acompute() -> int | bytes:
        value = default()
        return checked(value, await _adumped(value))

    return acompute if isinstance(cache, AsyncLRUCache) else compute


def _loaded(stored: Any, default: Any) -> Any:
    """Return the value that a stored form holds, or the default if nothing is stored."""
    if stored is _MISSING:
        return default
    return pickle.loads(stored) if isinstance(stored, bytes) else stored  # noqa: S301  see the module docstring


def _fits(key: Any, stored: int | bytes) -> bool:
    """Return whether a value can be stored. If not, log a warning."""
    if isinstance(stored, int) or len(stored) <= MAX_VALUE_BYTES:
        return True
    _log.warning("the value of %r is not cached: pickled, it has %d bytes", key, len(stored))
    return False
