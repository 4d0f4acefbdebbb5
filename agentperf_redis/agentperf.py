"""`AgentPerf`: one URL in, the three services out."""

from __future__ import annotations

import asyncio
import importlib
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from agentperf_redis import arguments
from agentperf_redis.backend import DEFAULT_DEADLINE_S, Backend

if TYPE_CHECKING:  # a service is loaded when it is first asked for
    from agentperf_redis.balancer.client import LoadBalancer
    from agentperf_redis.balancer.model import LoadBalancingStrategy
    from agentperf_redis.balancer.operations import OnUnavailable
    from agentperf_redis.balancer.settings import PoolSettings
    from agentperf_redis.cache.lru import LRUCache
    from agentperf_redis.cache.model import CacheStats, Policy, WithoutServer
    from agentperf_redis.cache.tiered import TieredCache
    from agentperf_redis.codec.codec import Codec
    from agentperf_redis.metrics.client import MetricsCollector


_SERVICES = ("balancer.client", "cache.lru", "cache.tiered", "metrics.client", "metrics.tracking")


def _load_services() -> None:
    for name in _SERVICES:
        importlib.import_module(f"agentperf_redis.{name}")


class CacheOptions(TypedDict, total=False):
    """What both kinds of caches take."""

    max_bytes: int | None
    policy: Policy | str
    strict: bool
    local_size: int | None
    local_bytes: int | None
    codec: Codec | None
    lease: float
    on_unavailable: WithoutServer | str


class LRUOptions(CacheOptions, total=False):
    """What `LRUCache` takes."""

    max_size: int
    default_ttl: float | None


class TieredOptions(CacheOptions, total=False):
    """What `TieredCache` takes."""

    hot_size: int
    warm_size: int
    cold_size: int
    hot_ttl: float | None
    warm_ttl: float | None
    cold_ttl: float | None


class AgentPerf:
    """Metrics, caches and a load balancer, shared by every process that uses the same server and namespace.

    Making one does no I/O. Objects are made once for each name: ``perf.cache("x")`` twice is one object. Leaving a
    ``with`` or ``async with`` block flushes what is buffered and closes the connections.

    A service is loaded when it is first asked for, which takes some 30 ms. Entering ``async with`` loads all of them on
    a thread, so that no first use holds up the event loop; without it, ask for the services before the loop runs.

    Args:
        url: where the server is: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://``,
            ``redis+sentinel://...`` or ``embedded://``. None: AGENTPERF_REDIS_URL, REDIS_URL, localhost.
        namespace: prefix of all keys, 1 to 64 characters of ``A-Z a-z 0-9 _ . -``. None: AGENTPERF_NAMESPACE, else
            "agentperf".
        deadline: seconds that one command may take in all, retries included.

    Raises:
        InvalidArgument: for a URL, namespace or deadline that cannot be.
    """

    def __init__(
        self, url: str | None = None, *, namespace: str | None = None, deadline: float = DEFAULT_DEADLINE_S
    ) -> None:
        self.backend = Backend(url, namespace=namespace, deadline=deadline)

    def __repr__(self) -> str:
        return f"AgentPerf({self.backend.address.masked!r}, namespace={self.backend.namespace!r})"

    @property
    def metrics(self) -> MetricsCollector:
        """The metrics of all agents of the namespace."""
        from agentperf_redis.metrics.client import MetricsCollector

        return self.backend.share("metrics", lambda: MetricsCollector(backend=self.backend))

    def balancer(
        self,
        strategy: LoadBalancingStrategy | str | None = None,
        *,
        settings: PoolSettings | None = None,
        on_unavailable: OnUnavailable = "raise",
    ) -> LoadBalancer:
        """Return the load balancer.

        Args:
            strategy: how instances are picked; fixed for each pool when its first instance is registered. None takes
                the pool's own, and LEAST_LOADED for a new one.
            settings: how the pools in which it registers instances judge them; None leaves what they have.
            on_unavailable: what callers get while the server cannot be reached: "raise" or "none".

        Returns:
            One object for each choice of these.
        """
        from agentperf_redis.balancer.client import LoadBalancer

        chosen = LoadBalancer.check_strategy(strategy)
        made = partial(LoadBalancer, chosen, settings=settings, on_unavailable=on_unavailable, backend=self.backend)
        if settings is None and on_unavailable == "raise":
            return self.backend.share(("lb", chosen), made)
        made()  # refuses what cannot be, which may not even be a key
        return self.backend.share(("lb", chosen, settings, on_unavailable), made)

    def cache(self, name: str = "default", **options: Unpack[LRUOptions]) -> LRUCache:
        """Return the LRU cache of a name: one object for each name.

        Args:
            name: of the cache; every process that uses it shares it.
            options: as for `LRUCache`; none takes the object made before, or else a cache as LRUCache makes it.

        Raises:
            InvalidArgument: for options that cannot be, or others than those of the object made before.
        """
        from agentperf_redis.cache.lru import LRUCache

        key = ("cache", arguments.name("name", name))
        if options:
            made = LRUCache(name=name, backend=self.backend, **options)
            return self.backend.share(key, lambda: made)
        return self.backend.share(key, lambda: LRUCache(name=name, backend=self.backend))

    def tiered_cache(self, name: str = "default", **options: Unpack[TieredOptions]) -> TieredCache:
        """Return the cache of a name with the tiers hot, warm and cold: one object for each name.

        Args:
            name: of the cache; every process that uses it shares it.
            options: as for `TieredCache`; none takes the object made before, or else a cache as TieredCache makes it.

        Raises:
            InvalidArgument: for options that cannot be, or others than those of the object made before.
        """
        from agentperf_redis.cache.tiered import TieredCache

        key = ("tiered", arguments.name("name", name))
        if options:
            made = TieredCache(name=name, backend=self.backend, **options)
            return self.backend.share(key, lambda: made)
        return self.backend.share(key, lambda: TieredCache(name=name, backend=self.backend))

    def caches(self) -> list[CacheStats]:
        """Return what all caches of the namespace hold and have done, whichever process uses them."""
        from agentperf_redis.cache.flows.inspection import read_all_stats

        return self.backend.run(read_all_stats(self.backend))

    async def acaches(self) -> list[CacheStats]:
        """Do as `caches`, without blocking the event loop."""
        from agentperf_redis.cache.flows.inspection import read_all_stats

        return await self.backend.arun(read_all_stats(self.backend))

    def close(self) -> None:
        """Flush what is buffered and close the connections. A second call does nothing."""
        self.backend.close()

    async def aclose(self) -> None:
        """Do as `close`, without blocking the event loop."""
        await self.backend.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(_load_services)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
