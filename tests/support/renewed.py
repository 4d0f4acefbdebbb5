"""A replacement for the renewal of compute leases, for tests without a server."""

from __future__ import annotations

from agentperf_redis.cache.process.compute_lease import ComputeLease


class Renewed:
    """Replaces the thread that renews leases.

    Attributes:
        compute_leases: the leases under renewal.
    """

    def __init__(self) -> None:
        self.compute_leases: list[ComputeLease] = []

    def keep(self, compute_lease: ComputeLease) -> None:
        """Record that a lease is renewed from now on."""
        self.compute_leases.append(compute_lease)

    def drop(self, compute_lease: ComputeLease) -> None:
        """Record that a lease is no longer renewed."""
        if compute_lease in self.compute_leases:
            self.compute_leases.remove(compute_lease)
