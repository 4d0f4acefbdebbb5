"""Estimates of the servers' clocks, and requests that servers refuse after their caller's deadline."""

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
    """One per backend and process; see `clock_of`. It stays valid in a forked child: both read the same clocks.

    Args:
        backend: its servers have the clocks.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ahead_ms: dict[str, float] = {}
        """By agent type: an upper bound on the server's clock minus `time.monotonic`."""

    def before_deadline(self, pool: Pool, request: Callable[[int], Command[T | TooLate]]) -> Flow[T]:
        """Send a request that the server refuses, by its own clock, once the caller has given up.

        A copy that arrives late therefore does not undo later changes by other processes.

        Args:
            pool: the pool it changes; in a Cluster, each pool has the clock of its node.
            request: builds the request from its time limit, ms.
        """
        for _ in range(_CLOCK_READINGS):
            sent_at = time.monotonic()
            # Before the first estimate the limit is long past, and the refusal carries the server's time.
            ahead_ms = self._ahead_ms.get(pool.agent_type, 0.0)
            answer = yield from request(math.ceil(ahead_ms + (sent_at + self._backend.deadline) * 1000))
            if not isinstance(answer, TooLate):
                return answer
            self._ahead_ms[pool.agent_type] = answer.now_ms + 1 - sent_at * 1000
        raise BackendUnavailable(self._backend.address.masked, "not_applied", "every attempt arrived too late")


def clock_of(backend: Backend) -> ServerClock:
    """Return this process's clock estimates for a backend's servers."""
    return backend.share("lb-clock", lambda: ServerClock(backend))
