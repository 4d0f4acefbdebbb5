"""What a cache object does, as flows: descriptions of I/O that the blocking and the asyncio client both drive."""

from __future__ import annotations

from copy import copy

from agentperf_redis.cache.flows.invalidation import Eraser
from agentperf_redis.cache.flows.reads import Reader
from agentperf_redis.cache.flows.single_flight import DEFAULT_LEASE_S, SingleFlight
from agentperf_redis.cache.flows.writes import Writer
from agentperf_redis.cache.model import CACHES_OWN_TTLS_MS, WithoutServer
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec


class CacheFlows:
    """The operations of one cache object, by subject.

    Args:
        shared: what it shares with other objects of the same cache.
        codec: turns values into bytes.
        strict: note each read at once.
        own_ttls_ms: lives of entries put into hot, warm, cold by this object; below 0 is the cache's.
        local: copies within this process, if they are to be used.
        lease_ms: life of the leases under which it computes.
        on_unavailable: what becomes of who wants a value computed while the server is away.
    """

    def __init__(
        self,
        shared: SharedState,
        codec: Codec,
        *,
        strict: bool = False,
        own_ttls_ms: tuple[int, int, int] = CACHES_OWN_TTLS_MS,
        local: LocalCopies | None = None,
        lease_ms: int = round(DEFAULT_LEASE_S * 1000),
        on_unavailable: WithoutServer = WithoutServer.COMPUTE,
    ) -> None:
        self.shared = shared
        self.reader = Reader(shared, codec, strict=strict, local=local)
        self.writer = Writer(shared, codec, own_ttls_ms)
        self.eraser = Eraser(shared)
        self.single_flight = SingleFlight(self.reader, self.writer, lease_ms, on_unavailable)

    def raising(self) -> CacheFlows:
        """Return the same operations, but who computes while the server is away gets the error."""
        flows, known = copy(self), self.single_flight
        flows.single_flight = SingleFlight(self.reader, self.writer, known.lease_ms, WithoutServer.RAISE)
        return flows
