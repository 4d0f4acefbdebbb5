"""What a process has to report of the reads it served: gathered, deduplicated, sent once.

A hit is one plain read, so the server does not see what was used. Each process tells it later: with its next put, or
after 0.2 s. Reports carry a rising sequence, and one is under way at a time. One whose fate is unknown is sent again as
it was; the server recognises it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from agentperf_redis.command import WakeUp, running_loop

MAX_READS = 256
"""Distinct keys in one report: a longer script call would hold up the server (about 1 ms at 3-6 us each)."""
MAX_PENDING = 16 * MAX_READS
"""Distinct keys that wait while the server is away; the oldest are then forgotten."""


@dataclass(frozen=True, slots=True)
class AccessReport:
    """One report, fixed once it was sent for the first time."""

    seq: int
    misses: int
    saved_ms: int
    corrupt: int
    reads: tuple[tuple[str, int], ...]
    """Stored name and count, oldest first."""


NO_REPORT = AccessReport(0, 0, 0, 0, ())


class AccessBuffer:
    """Gathers reads on any thread; hands out reports.

    Args:
        process: returns the identity under which this process reports.
        filled: called, outside any lock, when something waits that was not announced yet.

    Attributes:
        drain: returns further reads, counted elsewhere: stored name, count, computing time saved in ms.
    """

    def __init__(self, process: Callable[[], str], filled: Callable[[], None]) -> None:
        self._process = process
        self._filled = filled
        self.drain: Callable[[], list[tuple[str, int, int]]] = list
        self.start_empty()

    def start_empty(self) -> None:
        """Begin anew: also what a forked child does, since its parent reports what it has gathered."""
        self._lock = threading.Lock()
        self._reads: dict[str, int] = {}
        self._misses = self._saved_ms = self._corrupt = 0
        self._seq = 0
        self._open: AccessReport | None = None
        self._under_way = False
        self._announced = False
        self.flushing: WakeUp | None = None
        """Given when the flush that is under way has ended. Puts wait for it, to keep the order of touches."""

    @property
    def writer(self) -> str:
        """Who reports."""
        return self._process()

    @property
    def is_full(self) -> bool:
        """Whether more reads wait than one report takes."""
        return len(self._reads) >= MAX_READS

    @property
    def waits(self) -> bool:
        """Whether there is anything to report."""
        return bool(self._reads or self._misses or self._corrupt or self._open)

    def read(self, name: str, saved_ms: int) -> None:
        """Note a read that was served."""
        with self._lock:
            reads = self._reads
            reads[name] = reads.pop(name, 0) + 1  # popped, so that it moves to the end
            self._saved_ms += saved_ms
            if len(reads) > MAX_PENDING:
                del reads[next(iter(reads))]
        if not self._announced:
            self._announce()

    def found_corrupt(self) -> None:
        """Note that a read met something that is no value; it is a miss as well, and noted as such."""
        with self._lock:
            self._corrupt += 1
        if not self._announced:
            self._announce()

    def missed(self) -> None:
        """Note a read that was not served."""
        with self._lock:
            self._misses += 1
        if not self._announced:
            self._announce()

    def take(self, *, flush: bool = False) -> AccessReport:
        """Take the next report, or NO_REPORT if there is none or another is under way.

        Args:
            flush: nothing but the report is being sent.
        """
        with self._lock:
            if self._under_way:
                return NO_REPORT
            if self._open is None:
                for name, count, saved_ms in self.drain():
                    self._reads[name] = self._reads.pop(name, 0) + count
                    self._saved_ms += saved_ms
                if not (self._reads or self._misses or self._corrupt):
                    return NO_REPORT
                self._seq += 1
                reads = tuple(islice(self._reads.items(), MAX_READS))
                for name, _ in reads:
                    del self._reads[name]
                self._open = AccessReport(self._seq, self._misses, self._saved_ms, self._corrupt, reads)
                self._misses = self._saved_ms = self._corrupt = 0
            self._under_way = True
            self._announced = False
            if flush:
                self.flushing = WakeUp(running_loop())
            return self._open

    def settle(self, report: AccessReport, *, taken_in: bool) -> None:
        """Say what became of a report: taken in, or unknown, in which case it is sent again with the next chance."""
        if report is NO_REPORT:
            return
        with self._lock:
            self._under_way = False
            if taken_in:
                self._open = None
            flushing, self.flushing = self.flushing, None
            announce = self.waits and not self._announced
        if flushing is not None:
            flushing.send()
        if announce:
            self._announce()

    def announce(self) -> None:
        """Note that `drain` has something, unless that is known."""
        if not self._announced:
            self._announce()

    def _announce(self) -> None:
        self._announced = True
        self._filled()
