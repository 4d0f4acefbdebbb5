"""Time as a process has it: what a busy machine took from it is told apart from what was tested.

A test that says "within a second" is about the library. A machine that did not let the process run for a second says
nothing about that, so what is measured is the time that passed less the time for which a witness was held up:

    with StallDetector() as held_up:
        begin = time.monotonic()
        ...
        assert held_up.own(begin, time.monotonic()) < 1.0
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from agentperf_redis.backend import Backend

_EVERY_S = 0.005
_LATE_S = 0.0005
"""What a witness that sleeps for 5 ms is late by on a machine at rest; it is not noted."""


class StallDetector:
    """A witness: a thread that wants to run every few milliseconds, and notes when it could not.

    Args:
        ask: called each time, such as a server's `ping`: then it is also noted when that is held up.

    Attributes:
        spans: when it was held up, by `time.monotonic`, which the processes of a machine share.
    """

    def __init__(self, ask: Callable[[], object] = lambda: None) -> None:
        self.spans: list[tuple[float, float]] = []
        self._ask = ask
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            time.sleep(_EVERY_S)
            self._ask()
            now = time.monotonic()
            if now - self._last > _EVERY_S + _LATE_S:
                self.spans.append((self._last + _EVERY_S, now))
            self._last = now

    def within(self, begin: float, end: float) -> float:
        """Return for how many seconds of a stretch of time it was held up."""
        still = [] if self._ended.is_set() else [(self._last + _EVERY_S, time.monotonic())]  # it may not run yet
        return overlap([*self.spans, *still], begin, end)

    def own(self, begin: float, end: float) -> float:
        """Return how long a stretch of time was, without what it was held up for."""
        return end - begin - self.within(begin, end)


def overlap(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Return how many seconds of a stretch of time lie in spans that do not overlap."""
    return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in spans)


def union(*witnesses: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return when any of several witnesses was held up, as spans that do not overlap."""
    merged: list[tuple[float, float]] = []
    for since, until in sorted(span for spans in witnesses for span in spans):
        if merged and since <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(until, merged[-1][1])
        else:
            merged.append((since, until))
    return merged


def hurry(backend: Backend, deadline: float) -> Backend:
    """Give a backend's commands so little time from here on: what came before had what a busy machine may need."""
    backend.deadline = deadline
    backend._breaker._patience_s = deadline
    drivers: list[Any] = [backend._executor, *backend._async_executors.values()]
    for driver in drivers:
        driver._deadline_s = deadline
    return backend
