"""The lease under which one process computes a missing value while the others wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from agentperf_redis.cache.process.flights import Flight
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.errors import InvalidArgument


@dataclass(frozen=True, slots=True, eq=False)
class ComputeLease:
    """The right and the obligation to compute the value of a key.

    Attributes:
        shared: the cache.
        name: stored name of the key.
        key: the key.
        token: token of the lease. It is empty for a computation without a lease. Other processes never get the value of
            such a computation.
        lease_ms: TTL of the lease unless it is renewed.
        flight: the flight that waiters of this process can join; None if no caller can wait for this computation.
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
    """The value that the caller gets, whether found or computed.

    Attributes:
        value: the value.
        saved_ms: ms of computing time saved, if another caller has just computed the value; else 0.
        stale: version of the value if it is due for a refresh in the background; else 0.
        refused: the error that says why the value cannot be stored; None if it can.
    """

    value: Any
    saved_ms: int = 0
    stale: int = 0
    refused: InvalidArgument | None = None


Answer: TypeAlias = Served | ComputeLease
