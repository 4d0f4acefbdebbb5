"""What this process knows of the servers' clocks, and requests that are void after their caller's deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from agentperf_redis.backend import Backend
from agentperf_redis.balancer.commands import Pool, TooLate
from agentperf_redis.command import Command, Flow
from agentperf_redis.errors import BackendUnavailable

T = TypeVar("T")

_CLOCK_READINGS = 3


class ServerClock:
    """One per backend and process; see `clock_of`. In a forked child it stays right: both read the same clocks.

    Args:
        backend: whose servers' clocks.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ahead_ms: dict[str, float] = {}
        """By agent type: an upper bound of the server's clock less `time.monotonic`."""

    def before_deadline(self, pool: Pool, request: Callable[[int], Command[T | TooLate]]) -> Flow[T]:
        """Make a request that is void, by the server's clock, once its caller has given up.

        So a copy of it that arrives late does not undo what others have done since.

        Args:
            pool: what it is about; in a Cluster, each has the clock of its node.
            request: makes it, from its limit.
        """
        for _ in range(_CLOCK_READINGS):
            asked_at = time.monotonic()
            # Before anything is known of the clock the limit is long past, and the refusal tells the time.
            ahead_ms = self._ahead_ms.get(pool.agent_type, 0.0)
            answer = yield from request(math.ceil(ahead_ms + (asked_at + self._backend.deadline) * 1000))
            if not isinstance(answer, TooLate):
                return answer
            self._ahead_ms[pool.agent_type] = answer.now_ms + 1 - asked_at * 1000
        raise BackendUnavailable(self._backend.address.masked, "not_applied", "requests arrived too late each time")


def clock_of(backend: Backend) -> ServerClock:
    """Return what this process knows of the clocks of a backend's servers."""
    return backend.share("lb-clock", lambda: ServerClock(backend))
