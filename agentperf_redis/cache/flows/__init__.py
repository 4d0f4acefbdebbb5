"""The operations of a cache object as flows: descriptions of I/O that both the blocking and the asyncio client run."""

from __future__ import annotations

from copy import copy

from agentperf_redis.cache.flows.invalidation import Eraser
from agentperf_redis.cache.flows.misses import MissingEraser, MissingReader, MissingWriter
from agentperf_redis.cache.flows.reads import Reader
from agentperf_redis.cache.flows.single_flight import DEFAULT_LEASE_S, SingleFlight
from agentperf_redis.cache.flows.switched_off import IdleEraser, IdleReader, IdleWriter, NoFlight
from agentperf_redis.cache.flows.writes import Writer
from agentperf_redis.cache.model import CACHES_OWN_TTLS_MS, WithoutServer
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec


class CacheFlows:
    """The operations of one cache object, grouped by subject.

    Args:
        shared: the state shared with other objects of the same cache.
        codec: encodes and decodes values.
        strict: whether to record each read at once.
        own_ttls_ms: TTLs of entries that this object puts into hot, warm and cold; a negative one means the cache's
            default.
        local: local copies of this process; None if the object uses none.
        lease_ms: TTL of the object's compute leases.
        on_unavailable: what operations do while the server is unreachable.
        off: whether the object is switched off.
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
        off: bool = False,
    ) -> None:
        kinds: tuple[type[Reader], type[Writer], type[Eraser], type[SingleFlight]]
        kinds = (Reader, Writer, Eraser, SingleFlight)
        if off:
            kinds = (IdleReader, IdleWriter, IdleEraser, NoFlight)
        elif on_unavailable is WithoutServer.MISS:
            kinds = (MissingReader, MissingWriter, MissingEraser, SingleFlight)
        of_reads, of_writes, of_erasing, of_computing = kinds
        self.shared = shared
        self.off = off
        self.reader = of_reads(shared, codec, strict=strict, local=local)
        self.writer = of_writes(shared, codec, own_ttls_ms)
        self.eraser = of_erasing(self.reader)
        self.single_flight = of_computing(self.reader, self.writer, lease_ms, on_unavailable)

    def raising(self) -> CacheFlows:
        """Return the same operations, except that computing raises BackendUnavailable during an outage."""
        if self.off:
            return self
        flows, known = copy(self), self.single_flight
        flows.single_flight = SingleFlight(self.reader, self.writer, known.lease_ms, WithoutServer.RAISE)
        return flows
