"""A turn to compute: the lease under which one process computes a missing value while the others wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from agentperf_redis.cache.process.flights import Flight
from agentperf_redis.cache.process.shared_state import SharedState


@dataclass(frozen=True, slots=True, eq=False)
class ComputeLease:
    """The right, and the duty, to compute a key.

    Attributes:
        shared: the cache.
        name: stored name of the key.
        key: the key.
        token: of the lease; empty for a value that concerns nobody else, because it cannot be stored.
        lease_ms: life of the lease unless it is renewed.
        flight: others of this process who wait; None if none can.
    """

    shared: SharedState
    name: str
    key: str
    token: str
    lease_ms: int
    flight: Flight | None

    @property
    def renew_every_s(self) -> float:
        """Renewed at a third of its life, so that two renewals may get lost."""
        return self.lease_ms / 3000


@dataclass(frozen=True, slots=True)
class Served:
    """There is a value, and no need to compute any more.

    Attributes:
        value: the value.
        saved_ms: what that has saved, if another computed it meanwhile.
        stale: its version if it is due to be computed anew, behind whoever is served; else 0.
        storable: whether it is one that a cache can hold.
    """

    value: Any
    saved_ms: int = 0
    stale: int = 0
    storable: bool = True


Answer: TypeAlias = Served | ComputeLease
