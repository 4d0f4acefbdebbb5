"""Estimates the servers' clocks, and sends requests that a server refuses after the caller's deadline."""

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
    """Estimates of the clocks of a backend's servers. `clock_of` returns those of this process.

    The estimates stay valid in a forked child, because parent and child share the monotonic clock.

    Args:
        backend: the servers and namespace.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ahead_ms: dict[str, float] = {}
        """Hash tag -> upper bound of the lead of its node's clock over `time.monotonic`, ms. Shards may be on several
        nodes."""

    def before_deadline(self, pool: Pool, request: Callable[[int], Command[T | TooLate]]) -> Flow[T]:
        """Send a request that the server refuses if, by the server's clock, the caller's deadline has passed.

        This prevents a late copy of the request from undoing later changes by other processes.

        Args:
            pool: the shard that the request changes. In a Cluster, the clock of this shard's node is used.
            request: builds the request from its time limit, in ms of the server's clock.
        """
        for _ in range(_CLOCK_READINGS):
            sent_at = time.monotonic()
            # Without an estimate, the time limit lies far in the past. The server then refuses the request, and replies
            # with its own time.
            ahead_ms = self._ahead_ms.get(pool.keys.tag, 0.0)
            answer = yield from request(math.ceil(ahead_ms + (sent_at + self._backend.deadline) * 1000))
            if not isinstance(answer, TooLate):
                return answer
            self._ahead_ms[pool.keys.tag] = answer.now_ms + 1 - sent_at * 1000
        raise BackendUnavailable(self._backend.address.masked, "not_applied", "every attempt arrived too late")


def clock_of(backend: Backend) -> ServerClock:
    """Return this process's clock estimates for a backend's servers."""
    return backend.share("lb-clock", lambda: ServerClock(backend))
