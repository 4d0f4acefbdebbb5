"""How many exchanges may be under way at once: places that come back whatever interrupts their holder."""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

_LOOK_AGAIN_S: Final = 0.005
"""How often a waiter looks for a free place. It is woken sooner; but two waiters may get in each other's way."""


class Place:
    """A place that is taken. It is free again when `Places.give` is called, or when nothing refers to it."""

    __slots__ = ("__weakref__", "reference")

    reference: weakref.ref[Place]


class Places:
    """A bounded number of places, for the threads of a process.

    An exception that a signal handler raises, such as a soft time limit, may fall between any two steps of a holder. So
    a place is not a number that somebody has to count back: it is taken for as long as its object lives, and the end of
    the object is noted by C code (a weak reference whose callback is `set.discard`), which no signal interrupts. For
    the same reason there is no semaphore, whose lock an interrupted thread would leave held.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: set[weakref.ref[Place]] = set()
        self._freed: SimpleQueue[None] = SimpleQueue()

    def qsize(self) -> int:
        """Return how many are free."""
        return max(0, self._count - len(self._taken))

    def take(self, timeout_s: float) -> Place | None:
        """Take a place.

        Args:
            timeout_s: how long to wait for one.

        Returns:
            The place, to be given back; None when all were taken for so long.
        """
        place = Place()
        place.reference = reference = weakref.ref(place, self._taken.discard)
        end = 0.0
        while True:
            self._taken.add(reference)  # first, so that two threads never both take the last one
            if len(self._taken) <= self._count:
                return place
            self._taken.discard(reference)
            now = time.monotonic()
            end = end or now + timeout_s
            if now >= end:
                return None
            with suppress(Empty):
                self._freed.get(timeout=min(end - now, _LOOK_AGAIN_S))

    def give(self, place: Place) -> None:
        """Give a place back."""
        full = len(self._taken) >= self._count
        self._taken.discard(place.reference)
        if full and self._freed.qsize() < self._count:
            self._freed.put(None)
