"""`AgentPerf`: the three services of one server and namespace, created from a URL."""

from __future__ import annotations

import asyncio
import importlib
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from agentperf_redis import arguments
from agentperf_redis.backend import DEFAULT_DEADLINE_S, Backend
from agentperf_redis.errors import InvalidArgument

if TYPE_CHECKING:  # at run time, a service is imported on its first use
    from agentperf_redis.alerts.client import Alerts
    from agentperf_redis.balancer.client import LoadBalancer
    from agentperf_redis.balancer.model import LoadBalancingStrategy
    from agentperf_redis.balancer.operations import OnUnavailable
    from agentperf_redis.balancer.settings import PoolSettings
    from agentperf_redis.cache.lru import LRUCache
    from agentperf_redis.cache.model import CacheStats, Policy, WithoutServer
    from agentperf_redis.cache.tiered import TieredCache
    from agentperf_redis.codec.codec import Codec
    from agentperf_redis.locks.client import Lock, Semaphore
    from agentperf_redis.metrics.client import MetricsCollector


_LOADED_LATER = (
    "alerts.client",
    "balancer.client",
    "cache.lru",
    "cache.tiered",
    "locks.client",
    "metrics.client",
    "metrics.tracking",
    "script_header",
)


def _load_all() -> None:
    for name in _LOADED_LATER:
        importlib.import_module(f"agentperf_redis.{name}")


class CacheOptions(TypedDict, total=False):
    """Options that `LRUCache` and `TieredCache` share."""

    max_bytes: int | None
    policy: Policy | str
    strict: bool
    local_size: int | None
    local_bytes: int | None
    codec: Codec | None
    lease: float
    shards: int | None
    on_unavailable: WithoutServer | str


class LRUOptions(CacheOptions, total=False):
    """Options of `LRUCache`."""

    max_size: int
    default_ttl: float | None


class TieredOptions(CacheOptions, total=False):
    """Options of `TieredCache`."""

    hot_size: int
    warm_size: int
    cold_size: int
    hot_ttl: float | None
    warm_ttl: float | None
    cold_ttl: float | None


class LockOptions(TypedDict, total=False):
    """Options that `Lock` and `Semaphore` share."""

    timeout: float | None
    blocking: bool
    blocking_timeout: float | None
    ttl: float
    raise_on_release_error: bool


class AgentPerf:
    """Metrics, caches and a load balancer, shared by every process that uses the same server and namespace.

    The constructor does no I/O. There is one object for each name: ``perf.cache("x")`` returns the same object on each
    call. Leaving a ``with`` or ``async with`` block flushes the buffers and closes the connections.

    The code of a service is imported on first use; the import takes about 30 ms. ``async with`` imports all services on
    another thread, so that their first use does not block the event loop. An asyncio program without ``async with``
    should access the services before the loop runs.

    Args:
        url: where the server is: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://``,
            ``redis+sentinel://...`` or ``embedded://``. None: the URL in AGENTPERF_REDIS_URL, else in REDIS_URL, else
            localhost.
        namespace: prefix of all keys, 1 to 64 characters of ``A-Z a-z 0-9 _ . -``. None: AGENTPERF_NAMESPACE, else
            "agentperf".
        deadline: total seconds that one command may take, retries included.
        flush_on_sigterm: whether SIGTERM first flushes the metrics of this process and of the children forked from it.
            After the flush, SIGTERM runs the handler that was installed before, or ends the process. The flush takes at
            most 8 s, or at most 2 s if the server does not reply. A long call of C code on the main thread delays the
            start of the flush, as it delays every handler written in Python. The handler stays installed until `close`.
            The default is False, because a library should install signal handlers only on request.

    Raises:
        InvalidArgument: for an invalid argument, and for `flush_on_sigterm` outside the main thread, because Python
            installs signal handlers only on the main thread.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str | None = None,
        deadline: float = DEFAULT_DEADLINE_S,
        flush_on_sigterm: bool = False,
    ) -> None:
        self.backend = Backend(url, namespace=namespace, deadline=deadline, flush_on_sigterm=flush_on_sigterm)

    def __repr__(self) -> str:
        return f"AgentPerf({self.backend.address.masked!r}, namespace={self.backend.namespace!r})"

    @property
    def metrics(self) -> MetricsCollector:
        """The metrics of all agents of the namespace."""
        from agentperf_redis.metrics.client import MetricsCollector

        return self.backend.share("metrics", lambda: MetricsCollector(backend=self.backend))

    @property
    def alerts(self) -> Alerts:
        """The alerts of the namespace: rules, their states, notifications."""
        from agentperf_redis.alerts.client import Alerts

        return self.backend.share("alerts", lambda: Alerts(backend=self.backend))

    def balancer(
        self,
        strategy: LoadBalancingStrategy | str | None = None,
        *,
        settings: PoolSettings | None = None,
        on_unavailable: OnUnavailable = "raise",
    ) -> LoadBalancer:
        """Return the load balancer.

        Args:
            strategy: how instances are picked. The first registration in a pool fixes the pool's strategy. None uses
                the strategy of the pool, or LEAST_LOADED for a new pool.
            settings: health settings. They are applied to each pool in which this balancer registers an instance. None
                leaves the settings of the pools unchanged.
            on_unavailable: what calls do while the server is unreachable: "raise" or "none"; see `LoadBalancer`.

        Returns:
            One object for each combination of arguments.
        """
        from agentperf_redis.balancer.client import LoadBalancer
        from agentperf_redis.balancer.operations import checked_policy

        chosen, on_unavailable = LoadBalancer.check_strategy(strategy), checked_policy(on_unavailable)
        made = partial(LoadBalancer, chosen, settings=settings, on_unavailable=on_unavailable, backend=self.backend)
        if settings is None and on_unavailable == "raise":
            return self.backend.share(("lb", chosen), made)
        made()  # validates the arguments before they become a key: an invalid argument may be unhashable
        return self.backend.share(("lb", chosen, settings, on_unavailable), made)

    def lock(self, name: str, *, thread_local: bool = True, **options: Unpack[LockOptions]) -> Lock:
        """Return a lock: `with perf.lock("invoices"):`, `async with perf.lock("invoices").aio:`.

        Args:
            name: the name of the lock, which all processes share.
            thread_local: see `Lock`.
            options: as for `Lock`.

        Returns:
            A new object on each call.
        """
        from agentperf_redis.locks.client import Lock

        return Lock(name, thread_local=thread_local, backend=self.backend, **options)

    def semaphore(self, name: str, limit: int, **options: Unpack[LockOptions]) -> Semaphore:
        """Return a semaphore: `with perf.semaphore("gpus", 4):`, `async with perf.semaphore("gpus", 4).aio:`.

        Args:
            name: the name of the semaphore, which all processes share.
            limit: max units held at once.
            options: as for `Semaphore`.

        Returns:
            A new object on each call.
        """
        from agentperf_redis.locks.client import Semaphore

        return Semaphore(name, limit, backend=self.backend, **options)

    def cache(self, name: str | None = None, **options: Unpack[LRUOptions]) -> LRUCache:
        """Return the LRU cache with this name: one object for each name.

        Args:
            name: the name of the cache; all processes that use this name share the cache. None: a name that says
                where in the code the method is called, such as ``app.users``.
            options: as for `LRUCache`. Without options, returns the existing object, or a new LRUCache with the
                defaults.

        Raises:
            InvalidArgument: for invalid options, or options that differ from those of the existing object.
        """
        from agentperf_redis.cache.lru import LRUCache

        name = self._name_of_place("cache") if name is None else arguments.name("name", name)
        key = ("cache", name)
        if options:
            made = LRUCache(name=name, backend=self.backend, **options)
            return self.backend.share(key, lambda: made)
        return self.backend.share(key, lambda: LRUCache(name=name, backend=self.backend))

    def tiered_cache(self, name: str | None = None, **options: Unpack[TieredOptions]) -> TieredCache:
        """Return the tiered cache with this name: one object for each name. Its tiers are hot, warm and cold.

        Args:
            name: the name of the cache; all processes that use this name share the cache. None: a name that says
                where in the code the method is called, such as ``app.users``.
            options: as for `TieredCache`. Without options, returns the existing object, or a new TieredCache with the
                defaults.

        Raises:
            InvalidArgument: for invalid options, or options that differ from those of the existing object.
        """
        from agentperf_redis.cache.tiered import TieredCache

        name = self._name_of_place("tiered_cache") if name is None else arguments.name("name", name)
        key = ("tiered", name)
        if options:
            made = TieredCache(name=name, backend=self.backend, **options)
            return self.backend.share(key, lambda: made)
        return self.backend.share(key, lambda: TieredCache(name=name, backend=self.backend))

    def _name_of_place(self, method: str) -> str:
        from agentperf_redis.place import place_of

        place = place_of(self, self.backend.process, method)
        place.warn(f"{method}()", 1)
        return place.name

    def caches(self) -> list[CacheStats]:
        """Return the sizes and counters of all caches of the namespace, over all processes."""
        from agentperf_redis.cache.flows.inspection import read_all_stats

        return self.backend.run(read_all_stats(self.backend))

    async def acaches(self) -> list[CacheStats]:
        """Like `caches`, without blocking the event loop."""
        from agentperf_redis.cache.flows.inspection import read_all_stats

        return await self.backend.arun(read_all_stats(self.backend))

    def close(self) -> None:
        """Flush the buffers and close the connections. A second call does nothing."""
        self.backend.close()

    async def aclose(self) -> None:
        """Like `close`, without blocking the event loop."""
        await self.backend.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(_load_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def checked_perf(perf: object) -> AgentPerf:
    """Check an argument `perf`, and return it."""
    if not isinstance(perf, AgentPerf):
        raise InvalidArgument("perf", perf, "an AgentPerf")
    return perf
