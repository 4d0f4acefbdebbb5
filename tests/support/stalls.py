"""A stall detector finds the times at which a busy machine did not run a process. Tests subtract these times.

A bound such as "within a second" is about the library. If the machine did not run the process for a second, exceeding
the bound proves nothing about the library. Tests therefore subtract the detected stalls from the elapsed time:

    with StallDetector() as stalls:
        begin = time.monotonic()
        ...
        assert stalls.own(begin, time.monotonic()) < 1.0
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
"""Delay with which a thread that sleeps for 5 ms wakes up on an idle machine. Such a delay is not recorded."""


class StallDetector:
    """A thread that wakes every few milliseconds, and records the time spans in which it could not run.

    Args:
        probe: called at each wake-up. With a server's `ping`, stalls of the server are recorded as well.

    Attributes:
        spans: begin and end of each stall, in s of `time.monotonic`. All processes of a machine share this clock.
    """

    def __init__(self, probe: Callable[[], object] = lambda: None) -> None:
        self.spans: list[tuple[float, float]] = []
        self._probe = probe
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="stall-detector", daemon=True)

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
            self._probe()
            now = time.monotonic()
            if now - self._last > _EVERY_S + _LATE_S:
                self.spans.append((self._last + _EVERY_S, now))
            self._last = now

    def within(self, begin: float, end: float) -> float:
        """Return how many seconds of a time range were stalled."""
        current = [] if self._ended.is_set() else [(self._last + _EVERY_S, time.monotonic())]  # a stall in progress
        return overlap([*self.spans, *current], begin, end)

    def own(self, begin: float, end: float) -> float:
        """Return the length of a time range without the stalls in it."""
        return end - begin - self.within(begin, end)


def overlap(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Return how many seconds of a time range the spans cover. The spans must not overlap each other."""
    return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in spans)


def union(*detectors: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the stalls of any of several detectors, as spans that do not overlap."""
    merged: list[tuple[float, float]] = []
    for since, until in sorted(span for spans in detectors for span in spans):
        if merged and since <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(until, merged[-1][1])
        else:
            merged.append((since, until))
    return merged


def hurry(backend: Backend, deadline: float) -> Backend:
    """Shorten the deadline of a backend's commands, after a setup with the long deadline that a busy machine needs."""
    backend.deadline = deadline
    backend._breaker._attempt_timeout_s = deadline
    drivers: list[Any] = [backend._executor, *backend._async_executors.values()]
    for driver in drivers:
        driver._deadline_s = deadline
    return backend
