"""The lease under which one process computes a missing value while the others wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from agentperf_redis.cache.process.flights import Flight
from agentperf_redis.cache.process.shared_state import SharedState


@dataclass(frozen=True, slots=True, eq=False)
class ComputeLease:
    """The right and the obligation to compute a key.

    Attributes:
        shared: the cache.
        name: stored name of the key.
        key: the key.
        token: of the lease; empty for a computation without a lease, whose value other processes do not share.
        lease_ms: TTL of the lease unless it is renewed.
        flight: connects it to the waiters of this process; None if there can be none.
    """

    shared: SharedState
    name: str
    key: str
    token: str
    lease_ms: int
    flight: Flight | None

    @property
    def renew_every_s(self) -> float:
        """The interval of renewals: a third of the TTL, so that two renewals may be lost."""
        return self.lease_ms / 3000


@dataclass(frozen=True, slots=True)
class Served:
    """There is a value; no computation is needed.

    Attributes:
        value: the value.
        saved_ms: computing time saved, if another caller has just computed it.
        stale: its version if it is due for a refresh in the background; else 0.
        storable: whether a cache can store it.
    """

    value: Any
    saved_ms: int = 0
    stale: int = 0
    storable: bool = True


Answer: TypeAlias = Served | ComputeLease
