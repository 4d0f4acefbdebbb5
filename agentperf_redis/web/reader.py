"""The reads of the pages, shared: all pages that ask for the same within the refresh interval share one read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from agentperf_redis.agentperf import AgentPerf

T = TypeVar("T")

MAX_KEPT = 256
"""Maximum number of results that are kept. A page whose address has an arbitrary filter makes one of its own."""


class Shared:
    """Results of reads, each shared until it is older than `max_age_s`.

    A read that is under way is shared too, and so is its error, so that an unreachable server gets one attempt at a
    time from all pages together. A page that is closed does not interrupt a read that others wait for.

    Args:
        max_age_s: how long a result is shared, from the start of its read on.
        clock: monotonic time, s.
    """

    def __init__(self, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_age_s = max_age_s
        self._clock = clock
        self._reads: dict[Hashable, tuple[float, asyncio.Task[Any]]] = {}

    def __len__(self) -> int:
        return len(self._reads)

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `read`, or the one that another page got for this key lately.

        Args:
            key: names what is read: equal keys mean equal results.
            read: reads it.

        Raises:
            Exception: the error of the read.
        """
        now = self._clock()
        began, task = self._reads.get(key, (0.0, None))
        if task is None or (task.done() and now - began >= self._max_age_s) or task.get_loop().is_closed():
            self._forget_old(now)
            task = asyncio.ensure_future(_awaited(read))
            task.add_done_callback(_seen)
            self._reads[key] = now, task
        result: T = await asyncio.shield(task)
        return result

    def forget(self) -> None:
        """Share no result of a read that has begun until now."""
        self._reads.clear()

    def _forget_old(self, now: float) -> None:
        """Keep no result that will not be used again, and at most `MAX_KEPT` in all, the newest."""
        old = [key for key, (began, task) in self._reads.items() if task.done() and now - began >= self._max_age_s]
        done = [key for key, (_, task) in self._reads.items() if task.done()]
        for key in {*old, *done[: max(0, len(self._reads) - MAX_KEPT + 1)]}:
            del self._reads[key]


async def _awaited(read: Callable[[], Awaitable[T]]) -> T:
    return await read()


def _seen(task: asyncio.Task[Any]) -> None:
    """Mark the error of a read as retrieved, since all pages that wait for it may have been closed."""
    if not task.cancelled():
        task.exception()


class Reader:
    """What `agentperf_redis.views` reads, shared by all pages. Each method is the view of the same name.

    Args:
        perf: the server and the namespace.
        refresh_s: time between two reads of the same, s.
    """

    def __init__(self, perf: AgentPerf, refresh_s: float) -> None:
        self.perf = perf
        # Pages are refreshed together, so a little less than the interval lets each refresh read again.
        self.shared = Shared(refresh_s * 0.9)
