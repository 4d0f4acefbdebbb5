"""`AgentPerf`: one URL in, the three services out."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from agentperf_redis.backend import DEFAULT_DEADLINE_S, Backend
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.model import LoadBalancingStrategy
from agentperf_redis.cache.client import LRUCache, TieredCache
from agentperf_redis.metrics.client import MetricsCollector


class AgentPerf:
    """Metrics, caches and a load balancer, shared by every process that uses the same server and namespace.

    Making one does no I/O. Objects are made once for each name: ``perf.cache("x")`` twice is one object. Leaving a
    ``with`` or ``async with`` block flushes what is buffered and closes the connections.

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
        return self.backend.share("metrics", lambda: MetricsCollector(backend=self.backend))

    def balancer(self, strategy: LoadBalancingStrategy | str | None = None) -> LoadBalancer:
        """Return the load balancer.

        Args:
            strategy: how instances are picked; fixed for each pool when its first instance is registered. None takes
                the pool's own, and LEAST_LOADED for a new one.

        Returns:
            One object for each strategy.
        """
        chosen = LoadBalancer.check_strategy(strategy)
        return self.backend.share(("lb", chosen), lambda: LoadBalancer(chosen, backend=self.backend))

    def cache(
        self,
        name: str = "default",
        *,
        max_size: int = 1000,
        default_ttl: float | None = None,
    ) -> LRUCache:
        """Return the LRU cache of a name."""
        return LRUCache(max_size, default_ttl, name=name, backend=self.backend)

    def tiered_cache(
        self,
        name: str = "default",
        *,
        hot_size: int = 100,
        warm_size: int = 500,
        cold_size: int = 2000,
    ) -> TieredCache:
        """Return the cache of a name with the tiers hot, warm and cold."""
        return TieredCache(hot_size, warm_size, cold_size, name=name, backend=self.backend)

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
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
