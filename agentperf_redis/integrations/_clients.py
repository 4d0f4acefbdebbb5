"""The clients for adapters configured with a URL. A process has one connection for each server and namespace.

Frameworks make new cache objects for each thread or request, so these objects cannot own a connection.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from agentperf_redis.backend import Backend, default_backend, resolve_namespace
from agentperf_redis.background import ModuleLock
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.model import DefaultCount
from agentperf_redis.codec.codec import MAX_BYTES
from agentperf_redis.transport.address import resolve_url

CACHE_OPTIONS = ("max_bytes", "policy", "strict", "local_size", "local_bytes", "lease", "on_unavailable")
"""The options that adapters pass on to `LRUCache`."""
DEFAULT_MAX_SIZE = DefaultCount(10_000)
"""Capacity of a new cache, in entries. An existing cache keeps its own capacity."""
MAX_VALUE_BYTES = MAX_BYTES - 8
"""Maximum size of a stored value of type bytes. Its packed form also has a header of up to five bytes."""

_made: dict[tuple[str, str], Backend] = {}
_lock = ModuleLock()


def backend_for(url: str | None, namespace: str | None) -> Backend:
    """Return this process's backend for a server and namespace. If both are None, return the default backend.

    Raises:
        InvalidArgument: the URL or the namespace is invalid.
    """
    if url is None and namespace is None:
        return default_backend()
    key = (resolve_url(url), resolve_namespace(namespace))
    with _lock.lock:
        made = _made.get(key) if all(isinstance(part, str) for part in key) else None  # Backend refuses all but str
        if made is None or made.closed:
            made = _made[key] = Backend(url, namespace=namespace)
        return made


class CacheOfAdapter:
    """The cache of an adapter's object.

    An adapter's object may be made while a program is imported. So if neither a URL nor a namespace is given, each call
    looks up the process-wide default backend. If the backend was closed, the next call connects again.

    Args:
        url: where the server is.
        namespace: the prefix of all keys.
        name: the name of the cache.
        options: the options of the `LRUCache`.

    Raises:
        InvalidArgument: an argument is invalid, or an option differs from that of another cache with this name in this
            process.
    """

    def __init__(self, url: str | None, namespace: str | None, name: str, options: dict[str, Any]) -> None:
        self._url = url
        self._namespace = namespace
        self._name = name
        self._options = options
        self._current: tuple[Backend, LRUCache] | None = None
        self.current()

    def backend(self) -> Backend:
        """Return the backend for the next call."""
        return backend_for(self._url, self._namespace)

    def current(self) -> LRUCache:
        """Return the cache for the next call."""
        backend, current = self.backend(), self._current
        if current is None or current[0] is not backend:
            current = self._current = backend, _cache_of(backend, self._name, self._options)
        return current[1]


def _cache_of(backend: Backend, name: str, options: dict[str, Any]) -> LRUCache:
    """Return this process's cache with this name and these options. A cache without users is forgotten.

    Raises:
        InvalidArgument: an option is invalid, or differs from that of another cache with this name in this process.
    """
    known: WeakValueDictionary[object, LRUCache] = backend.share("caches of adapters", WeakValueDictionary)
    key = (name, *sorted((option, repr(value)) for option, value in options.items()))
    with _lock.lock:
        cache = known.get(key)
        if cache is None:
            made = {"max_size": DEFAULT_MAX_SIZE, **options}
            cache = known[key] = LRUCache(name=name, backend=backend, **made)
        return cache
