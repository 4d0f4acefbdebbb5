"""The executions that a process has begun and not ended, such as a hung call. No I/O here.

Each tracked execution adds itself and removes itself. Both operations are calls of C code without a lock, so they are
fast.

A program may drop an execution without ending it. Examples are a coroutine that is never awaited, and a generator whose
event loop has ended. A set of strong references would keep such an execution forever and show it as hung. Therefore an
execution that has run for a while is referenced only weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from heapq import nsmallest
from operator import itemgetter
from typing import TYPE_CHECKING

from agentperf_redis.presence import OpenCalls

if TYPE_CHECKING:
    from agentperf_redis.metrics.spans import Span


class OpenExecutions:
    """The open executions of one process and namespace.

    Args:
        on_first: called when the first execution begins. Must be quick, since the tracked code waits for it.

    Attributes:
        add: adds an execution that begins.
        discard: removes an execution that has ended.
    """

    __slots__ = ("__weakref__", "_old", "_on_first", "_young", "add", "discard")

    def __init__(self, on_first: Callable[[], object]) -> None:
        self._on_first = on_first
        self._young: set[Span] = set()
        self._old: set[weakref.ref[Span]] = set()
        self.discard: Callable[[Span], None] = self._young.discard
        self.reset()

    def reset(self) -> None:
        """Start empty: in a forked child, the executions that the fork copied belong to the parent."""
        self._young.clear()
        self._old.clear()
        self.add: Callable[[Span], None] = self._add_first

    def _add_first(self, execution: Span) -> None:
        self._young.add(execution)
        self.add = self._young.add
        self._on_first()

    def oldest(self, now: float, min_age: float, limit: int) -> OpenCalls:
        """Return the oldest executions that have been open for at least `min_age` seconds.

        Any thread may call this method while other threads begin and end executions: `list` copies a set in one step.

        Args:
            now: the present time by `perf_counter`.
            min_age: minimum age, s.
            limit: maximum number of executions.
        """
        for execution in list(self._young):
            if now - execution._start >= min_age:  # noqa: SLF001  the start has no public name
                self._old.add(weakref.ref(execution))
                self._young.discard(execution)
        found = []
        for reference in list(self._old):
            open_one = reference()
            if open_one is not None and open_one.is_open:
                found.append((open_one.agent_name, open_one._start))  # noqa: SLF001  as above
            else:
                self._old.discard(reference)
        oldest = nsmallest(limit, found, key=itemgetter(1))
        return OpenCalls(tuple(oldest), len(found) - len(oldest))
