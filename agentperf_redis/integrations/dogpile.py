"""`AgentPerfBackend`: a backend of dogpile.cache. All processes share its LRU cache and its mutexes.

``region = make_region().configure("agentperf", expiration_time=300, arguments={"url": "redis://host:6379/0"})``

The region serializes each value, by default with pickle. With pickle, everyone who can write to the server can run code
in the processes that read from it. `make_region(serializer=json..., deserializer=json...)` avoids this risk. Entries
are lost if a full cache evicts them, the least recently used first, or if the server loses its data.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from agentperf_redis import arguments as checks
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.errors import BackendUnavailable, InvalidArgument, LockNotOwned
from agentperf_redis.extras import extra
from agentperf_redis.integrations._clients import CACHE_OPTIONS, MAX_VALUE_BYTES, CacheOfAdapter
from agentperf_redis.locks.client import Lock

with extra("dogpile"):
    from dogpile.cache.api import NO_VALUE, BytesBackend, CacheMutex

_log = logging.getLogger("agentperf_redis")

_ARGUMENTS = ("url", "namespace", "name", "expiration_time", "distributed_lock", "lock_timeout", "max_size")
_SHOWN_OF_A_LONG_KEY = 100


class AgentPerfBackend(BytesBackend):  # type: ignore[misc,unused-ignore]  # the base is Any without dogpile.cache
    """The backend "agentperf" of dogpile.cache.

    Of the callers in all processes, only one creates a missing value. If a value is older than the region's
    `expiration_time`, one caller creates the next value, and dogpile returns the old value to the other callers. So the
    server should keep values for longer than this `expiration_time`.

    `arguments`:
        url: where the server is; by default AGENTPERF_REDIS_URL.
        namespace: the prefix of all keys on the server; by default AGENTPERF_NAMESPACE, else "agentperf".
        name: the name of the cache in `agentperf cache list`, by default "dogpile". Regions with the same server and
            name share one cache and its limits; a `key_mangler` keeps their keys apart.
        expiration_time: seconds after which the server drops a value. Choose at least a few times the `expiration_time`
            of the region. None, the default, means no expiry.
        distributed_lock: True, the default: all processes share the mutex of a key. False: dogpile uses a lock within
            each process.
        lock_timeout: seconds after which the mutex is free in any case. None, the default: the mutex is renewed until
            it is released. If the process that holds it dies, the mutex is free after half a minute.
        max_size: max entries of all processes together, by default 10,000.
        on_unavailable: what happens while the server is unreachable. "miss": reads find nothing, writes store nothing,
            and the mutex lets every caller pass. By default, all methods raise BackendUnavailable.
        max_bytes, policy, strict, local_size, local_bytes, lease: see `LRUCache`.

    Other arguments are ignored, as in dogpile's own backends, and a log line names them. A serialized value of more
    than 1 MiB is not stored. A log line reports this, and the older value of the key is removed.

    Raises:
        InvalidArgument: an argument is invalid, or another region with this name has other limits.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        given = dict(arguments)
        unknown = sorted(set(given).difference(_ARGUMENTS, CACHE_OPTIONS))
        if unknown:
            _log.warning("arguments that the backend agentperf of dogpile.cache does not know: %s", ", ".join(unknown))
        options = {option: given[option] for option in ("max_size", *CACHE_OPTIONS) if option in given}
        self._ttl = _ttl(given.get("expiration_time"))
        self._distributed = checks.flag("distributed_lock", given.get("distributed_lock", True))
        self._lock_timeout = given.get("lock_timeout")
        name = given.get("name", "dogpile")
        self._shared = CacheOfAdapter(given.get("url"), given.get("namespace"), name, options)
        self._lenient = options.get("on_unavailable") == "miss"
        self._mutex("")  # raises now if lock_timeout is invalid

    @property
    def _cache(self) -> LRUCache:
        return self._shared.current()

    def has_lock_timeout(self) -> bool:
        """Return whether the mutex may expire before it is released."""
        return self._lock_timeout is not None

    def get_mutex(self, key: str) -> AgentPerfMutex | None:
        """Return the mutex of a key, which all processes share; None without `distributed_lock`."""
        return self._mutex(key) if self._distributed else None

    def _mutex(self, key: str) -> AgentPerfMutex:
        name = f"{self._cache.name}:{key}"
        try:
            checks.name("key", name)
        except InvalidArgument:  # the name is too long, or has control characters
            digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
            name = f"{checks.nearest_name(name)[:_SHOWN_OF_A_LONG_KEY]}#{digest}"
        # `thread_local=False`: an `async_creation_runner` may release the mutex on another thread.
        lock = Lock(name, timeout=self._lock_timeout, thread_local=False, backend=self._shared.backend())
        return AgentPerfMutex(lock, lenient=self._lenient)

    def get_serialized(self, key: str) -> Any:
        """Return the stored bytes of a key, or NO_VALUE."""
        return _checked(self._cache.get(key, NO_VALUE))

    def get_serialized_multi(self, keys: Iterable[str]) -> list[Any]:
        """Return the stored bytes of each key, or NO_VALUE. Sends one command for every 256 keys."""
        names = list(keys)
        found = self._cache.get_many(names)
        return [_checked(found.get(name, NO_VALUE)) for name in names]

    def set_serialized(self, key: str, value: bytes) -> None:
        """Store bytes. If they cannot be stored, the older value is removed."""
        if not (_fits(key, value) and self._cache.put(key, value, self._ttl)):
            self._cache.delete(key)

    def set_serialized_multi(self, mapping: Mapping[str, bytes]) -> None:
        """Store the bytes of several keys, in one round trip for every 256 keys."""
        fitting = {key: value for key, value in mapping.items() if _fits(key, value)}
        refused = self._cache.put_many(fitting, self._ttl).refused
        if refused or len(fitting) < len(mapping):
            self._cache.delete_many([*refused, *(key for key in mapping if key not in fitting)])

    def delete(self, key: str) -> None:
        """Remove a key."""
        self._cache.delete(key)

    def delete_multi(self, keys: Iterable[str]) -> None:
        """Remove several keys. Sends one command for every 256 keys."""
        self._cache.delete_many(keys)


class AgentPerfMutex(CacheMutex):  # type: ignore[misc,unused-ignore]
    """A fair mutex that all processes share.

    By default, it is renewed while the process that holds it lives. It becomes free if that process dies.

    Args:
        lock: the lock. Any thread may release it.
        lenient: whether `acquire` lets its caller pass while the server is unreachable.
    """

    def __init__(self, lock: Lock, *, lenient: bool) -> None:
        self._lock = lock
        self._lenient: tuple[type[Exception], ...] = (BackendUnavailable,) if lenient else ()

    def acquire(self, wait: bool = True) -> bool:
        """Acquire the mutex. With `wait`, wait for it without a limit. Returns whether it was acquired."""
        try:
            return self._lock.acquire(blocking=bool(wait))
        except self._lenient:
            return True

    def release(self) -> None:
        """Release the mutex. If it was already lost, the log has reported this, and the value may be created twice."""
        if self._lenient and self._lock.fence is None:  # `acquire` returned without the lock
            return
        with contextlib.suppress(LockNotOwned, *self._lenient):
            self._lock.release()

    def locked(self) -> bool:
        """Return whether any process holds the mutex."""
        try:
            return self._lock.locked()
        except self._lenient:
            return False


def _ttl(expiration_time: Any) -> float:
    return math.inf if expiration_time is None else checks.seconds("expiration_time", expiration_time, endless=True)


def _checked(stored: Any) -> Any:
    return stored if isinstance(stored, bytes) else NO_VALUE


def _fits(key: str, value: bytes) -> bool:
    if len(value) <= MAX_VALUE_BYTES:
        return True
    _log.warning("the value of %r is not cached: serialized, it has %d bytes", key, len(value))
    return False
