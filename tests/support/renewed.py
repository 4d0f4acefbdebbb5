"""What stands in for the renewal of compute leases, in tests without a server."""

from __future__ import annotations

from agentperf_redis.cache.process.compute_lease import ComputeLease


class Renewed:
    """Stands in for the thread that renews leases.

    Attributes:
        compute_leases: those that are renewed.
    """

    def __init__(self) -> None:
        self.compute_leases: list[ComputeLease] = []

    def keep(self, compute_lease: ComputeLease) -> None:
        """Note that it is renewed from now on."""
        self.compute_leases.append(compute_lease)

    def drop(self, compute_lease: ComputeLease) -> None:
        """Note that it is renewed no more."""
        if compute_lease in self.compute_leases:
            self.compute_leases.remove(compute_lease)
