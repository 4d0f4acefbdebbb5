"""LangGraph: a cache for nodes, shared by all processes.

    graph = builder.compile(cache=AgentPerfCache(perf))  # for nodes added with cache_policy=CachePolicy(ttl=60)

If a node with a `CachePolicy` has run for an input in any process, later calls with this input get the writes of that
run. Each value is tagged with its namespace. So `clear` with namespaces is one step on the server, whatever the number
of values.

By default, LangGraph's key of an input is a hash of the input's pickled form. Equal inputs may have different pickled
forms. Examples are a text that was read from JSON twice, and a set that was pickled in two processes. In that case, the
node runs again. `CachePolicy(key_func=)` avoids that.

The cache stores the writes of nodes. They may contain built-in types, LangChain's messages and documents, `Send` and
`Overwrite`, and instances of classes that the program declares `storable`. Writes with any other value are not stored:
the node runs each time, and the log names the part that cannot be stored. While the server is unreachable, nodes run
each time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

from agentperf_redis import keys as key_names
from agentperf_redis.agentperf import AgentPerf, LRUOptions, checked_perf
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.model import WithoutServer
from agentperf_redis.errors import AgentPerfError, shown
from agentperf_redis.extras import extra

with extra("langgraph"):
    from langgraph.cache.base import BaseCache, FullKey, Namespace, ValueT
    from langgraph.types import Overwrite, Send, TimeoutPolicy

    from agentperf_redis.integrations._langchain_values import not_stored, register

_log = logging.getLogger("agentperf_redis")

register(Overwrite)
register(TimeoutPolicy)
register(
    Send,
    dump=lambda send: [send.node, send.arg, send.timeout],
    load=lambda state: Send(state[0], state[1], timeout=state[2]),
)


class AgentPerfCache(BaseCache[ValueT]):
    """A node cache for LangGraph: ``builder.compile(cache=AgentPerfCache(perf))``.

    With a TTL of zero or less, a value is not stored, as in LangGraph's own caches. If a value cannot be stored, this
    is logged and not raised, and the node runs again.

    Args:
        perf: the server and namespace.
        name: name of the cache. All objects of this name, in all processes, are the same cache.
        serde: a serializer of LangGraph, for values of any class. It replaces the library's own encoding, which
            supports fewer classes. LangGraph's `JsonPlusSerializer` imports the classes that the stored bytes name.
            With it, everyone who can write to the server can run code in this process, unless LANGGRAPH_STRICT_MSGPACK
            is set. A serializer with a pickle fallback always has this risk.
        options: as for `LRUCache`. The default of `on_unavailable` is "miss". `default_ttl` is the TTL of values whose
            `CachePolicy` has none; by default, such values do not expire.

    Raises:
        InvalidArgument: an argument is invalid, or another object of this cache has other options.
    """

    def __init__(
        self,
        perf: AgentPerf,
        name: str = "langgraph",
        *,
        serde: Any = None,
        **options: Unpack[LRUOptions],
    ) -> None:
        super().__init__(serde=serde)
        options.setdefault("on_unavailable", WithoutServer.MISS)
        self._cache: LRUCache = checked_perf(perf).cache(name, **options)
        self._serde = serde

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, ValueT]:
        """Return the values of the keys that have one, in one round trip for every 256 keys."""
        names = self._names(keys)
        return self._loaded(names, self._cache.get_many(names)) if names else {}

    async def aget(self, keys: Sequence[FullKey]) -> dict[FullKey, ValueT]:
        """Like `get`, for asyncio."""
        names = self._names(keys)
        return self._loaded(names, await self._cache.aio.get_many(names)) if names else {}

    def set(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> None:
        """Store values, each with a TTL in seconds. If it is None, `default_ttl` applies: by default, no expiry."""
        for key, value, ttl, tag in self._stored(pairs):
            try:
                if ttl is not None and ttl <= 0:
                    self._cache.delete(key)
                else:
                    self._cache.put(key, value, ttl, tags=(tag,))
            except AgentPerfError as error:
                not_stored(self._cache.name, error)

    async def aset(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> None:
        """Like `set`, for asyncio."""
        for key, value, ttl, tag in self._stored(pairs):
            try:
                if ttl is not None and ttl <= 0:
                    await self._cache.aio.delete(key)
                else:
                    await self._cache.aio.put(key, value, ttl, tags=(tag,))
            except AgentPerfError as error:
                not_stored(self._cache.name, error)

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Make all values of exactly these namespaces misses. None clears this whole cache, but no other cache."""
        if namespaces is None:
            self._cache.clear()
        elif namespaces:
            self._cache.invalidate_tags(*map(_tag, namespaces))

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Like `clear`, for asyncio."""
        if namespaces is None:
            await self._cache.aio.clear()
        elif namespaces:
            await self._cache.aio.invalidate_tags(*map(_tag, namespaces))

    def _stored(self, pairs: Mapping[FullKey, tuple[ValueT, int | None]]) -> Iterator[tuple[str, Any, int | None, str]]:
        """Yield the key, value, TTL and tag of each pair, as the cache stores them."""
        for full_key, (value, ttl) in pairs.items():
            try:
                stored = self._dumped(value)
            except Exception as error:  # noqa: BLE001  a serializer may raise any error
                not_stored(self._cache.name, error)
            else:
                yield self._name(full_key), stored, ttl, _tag(full_key[0])

    def _dumped(self, value: Any) -> Any:
        if self._serde is not None:
            return list(self._serde.dumps_typed(value))
        return list(value) if isinstance(value, deque) else value  # LangGraph collects the writes of a node in a deque

    def _loaded(self, names: Mapping[str, FullKey], found: Mapping[str, Any]) -> dict[FullKey, ValueT]:
        loaded: dict[FullKey, ValueT] = {}
        for name, stored in found.items():
            try:
                loaded[names[name]] = stored if self._serde is None else self._serde.loads_typed(tuple(stored))
            except Exception as error:  # noqa: BLE001  as above
                _log.warning("the serializer of the cache %r cannot read a value: %s", self._cache.name, shown(error))
        return loaded

    def _names(self, keys: Sequence[FullKey]) -> dict[str, FullKey]:
        return {self._name(key): (tuple(key[0]), key[1]) for key in keys}

    def _name(self, full_key: FullKey) -> str:
        """Return the key in the cache. A serializer stores values in another form, so its keys have another prefix."""
        namespace, key = full_key
        start = "" if self._serde is None else "serde:"
        return f"{start}{_path(namespace)}:{key_names.encoded(key)}"


def _path(namespace: Namespace) -> str:
    """Return a text that no other namespace has. The encoded parts contain neither a slash nor a colon."""
    return "ns" + "".join(f"/{key_names.encoded(part)}" for part in namespace)


def _tag(namespace: Namespace) -> str:
    return key_names.stored_name(_path(namespace))  # limited in length, as tags must be
