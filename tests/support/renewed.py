"""What stands in for the renewal of compute leases, in tests without a server."""

from __future__ import annotations

from agentperf_redis.cache.process.compute_lease import Turn


class Renewed:
    """Stands in for the thread that renews leases.

    Attributes:
        turns: those that are renewed.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def keep(self, turn: Turn) -> None:
        """Note that it is renewed from now on."""
        self.turns.append(turn)

    def drop(self, turn: Turn) -> None:
        """Note that it is renewed no more."""
        if turn in self.turns:
            self.turns.remove(turn)
