"""Shared reads: all pages that ask for the same data within the refresh interval share one read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, ScriptFailed
from agentperf_redis.views import agents, alerts, caches, memory, overview, pools
from agentperf_redis.views.agents import AgentsView, AgentView, Sparklines
from agentperf_redis.views.alerts import AlertsView
from agentperf_redis.views.caches import CachesView, CacheView
from agentperf_redis.views.memory import MemoryView
from agentperf_redis.views.overview import Changes, Overview
from agentperf_redis.views.pools import PoolsView, PoolView
from agentperf_redis.views.reading import Fault
from agentperf_redis.views.timeline import DEFAULT_WINDOW

T = TypeVar("T")

CHANGES_S: Final = 60.0
"""How long requests share one comparison of the last hour with the hour before, s."""
MEMORY_S: Final = 60.0
"""How long requests share one view of the memory, s. The time is long, because the view lists all keys."""
MAX_KEPT: Final = 256
"""Maximum number of results that are kept. Each filter in the address of a page causes a result of its own."""


@dataclass(frozen=True, slots=True)
class _Read:
    began: float
    max_age_s: float
    task: asyncio.Task[Any]


class Shared:
    """Results of reads, each shared until it is older than `max_age_s`.

    A read that is under way is shared too. An error is shared like a result, so that all pages together make only one
    attempt at a time to reach an unreachable server. A page that is closed does not interrupt a read for which other
    pages wait.

    Args:
        max_age_s: how long a result is shared, counted from the start of its read, s.
        clock: monotonic time, s.
    """

    def __init__(self, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_age_s = max_age_s
        self._clock = clock
        self._reads: dict[Hashable, _Read] = {}

    def __len__(self) -> int:
        return len(self._reads)

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]], max_age_s: float | None = None) -> T:
        """Return the result of `read`, or a recent result that another page got for this key.

        Args:
            key: names what is read: equal keys mean equal results.
            read: does the read.
            max_age_s: how long this result is shared, s; None for the `max_age_s` of this object, which is also the
                longest time for which an error is shared.

        Raises:
            Exception: the error of the read.
        """
        now, found = self._clock(), self._reads.get(key)
        if found is None or self._is_over(found, now):
            self._reads = {each: kept for each, kept in self._newest() if not self._is_over(kept, now)}
            task = asyncio.ensure_future(_awaited(read))
            task.add_done_callback(_seen)
            found = self._reads[key] = _Read(now, self._max_age_s if max_age_s is None else max_age_s, task)
        result: T = await asyncio.shield(found.task)
        return result

    def forget(self) -> None:
        """Stop sharing the results of all reads that began before this call."""
        self._reads.clear()

    def _is_over(self, read: _Read, now: float) -> bool:
        """Whether the result of a read is not shared any longer."""
        task = read.task
        if not task.done():
            return task.get_loop().is_closed()
        failed = task.cancelled() or task.exception() is not None
        return now - read.began >= (min(read.max_age_s, self._max_age_s) if failed else read.max_age_s)

    def _newest(self) -> list[tuple[Hashable, _Read]]:
        """Return the reads without the oldest finished ones, so that there is room for one more within `MAX_KEPT`."""
        done = [key for key, read in self._reads.items() if read.task.done()]
        left_out = set(done[: max(0, len(self._reads) - MAX_KEPT + 1)])
        return [(key, read) for key, read in self._reads.items() if key not in left_out]


async def _awaited(read: Callable[[], Awaitable[T]]) -> T:
    return await read()


def _seen(task: asyncio.Task[Any]) -> None:
    """Mark the error of a read as retrieved, since all pages that wait for it may have been closed."""
    if not task.cancelled():
        task.exception()


async def _no_sparklines() -> dict[str, asyncio.Task[Sparklines]]:
    return {}


class Reader:
    """What `agentperf_redis.views` reads, shared by all pages. Each method reads the view of the same name.

    Args:
        perf: the server and the namespace.
        refresh_s: time between two reads of the same data, s.
    """

    def __init__(self, perf: AgentPerf, refresh_s: float) -> None:
        self.perf = perf
        # All open pages share results. By default, a result is shared for slightly less than the refresh interval, so
        # that each refresh of a page reads new data.
        self.shared = Shared(refresh_s * 0.9)

    async def overview(self, window: str | float = DEFAULT_WINDOW) -> Overview:
        """See `views.overview.read_overview`. The changes of the last hour are read less often."""
        changes: Changes | None = None
        with suppress(CorruptState, ScriptFailed):  # on failure, `read_overview` reads the changes and names the fault
            changes = await self._view(overview.read_changes, max_age_s=CHANGES_S)
        key = (overview.read_overview, window)
        return await self.shared.get(key, lambda: overview.read_overview(self.perf, window, known_changes=changes))

    async def agents(self, window: str | float = DEFAULT_WINDOW, **options: Any) -> AgentsView:
        """See `views.agents.read_agents`. All orders, filters and pages of a window share one read of all agents."""
        agents.check_rows(**options)
        view = agents.listed(await self._view(agents.read_all_agents, window), **options)
        if not view.rows:
            return view
        return agents.with_sparklines(view, await self._sparklines([row.name for row in view.rows], window))

    async def _sparklines(self, names: list[str], window: str | float) -> Sparklines:
        """Return the sparklines of some agents. Each agent's sparkline is read once per interval for all pages."""
        reads: dict[str, asyncio.Task[Sparklines]] = await self.shared.get(
            (agents.read_sparklines, window), _no_sparklines
        )
        missing = [name for name in names if name not in reads]
        if missing:
            task = asyncio.ensure_future(agents.read_sparklines(self.perf, missing, window))
            task.add_done_callback(_seen)
            reads.update(dict.fromkeys(missing, task))
        tasks = dict.fromkeys(reads[name] for name in names)
        await asyncio.wait(tasks)  # if this page is closed, the tasks go on, because other pages may wait for them
        found = [task.result() for task in tasks]
        lines = {name: line for each in found for name, line in each.lines.items()}
        return Sparklines(lines, tuple(dict.fromkeys(fault for each in found for fault in each.faults)))

    async def agent(self, name: str, window: str | float = DEFAULT_WINDOW, **options: Any) -> AgentView:
        """See `views.agents.read_agent`."""
        return await self._view(agents.read_agent, name, window, **options)

    async def caches(self, window: str | float = DEFAULT_WINDOW, **options: Any) -> CachesView:
        """See `views.caches.read_caches`."""
        return await self._view(caches.read_caches, window, **options)

    async def cache(self, name: str, window: str | float = DEFAULT_WINDOW, **options: Any) -> CacheView | None:
        """See `views.caches.read_cache`. The top entries are read less often."""
        view = await self._view(caches.read_cache, name, window, **options, entries=False)
        if view is None:
            return None
        try:
            entries = await self._view(caches.read_entries, name, view.kind, max_age_s=caches.ENTRIES_EVERY_S)
        except BackendUnavailable:
            raise
        except AgentPerfError as error:
            return replace(view, faults=(*view.faults, Fault("entries", str(error))))
        return replace(view, entries=entries)

    async def pools(self, window: str | float = DEFAULT_WINDOW, **options: Any) -> PoolsView:
        """See `views.pools.read_pools`."""
        return await self._view(pools.read_pools, window, **options)

    async def pool(self, name: str, window: str | float = DEFAULT_WINDOW, **options: Any) -> PoolView | None:
        """See `views.pools.read_pool`."""
        return await self._view(pools.read_pool, name, window, **options)

    async def alerts(self, **options: Any) -> AlertsView:
        """See `views.alerts.read_alerts`."""
        return await self._view(alerts.read_alerts, **options)

    async def memory(self) -> MemoryView:
        """See `views.memory.read_memory`. It lists all keys, so this read runs at most once in `MEMORY_S` seconds."""
        return await self._view(memory.read_memory, max_age_s=MEMORY_S)

    async def _view(
        self, read: Callable[..., Awaitable[T]], *args: Hashable, max_age_s: float | None = None, **options: Any
    ) -> T:
        key = (read, args, tuple(sorted(options.items())))
        return await self.shared.get(key, lambda: read(self.perf, *args, **options), max_age_s)
