"""Buffers the reads of a process until they are reported. Several reads of one key are reported as a count.

A hit is one plain read command, which does not record the access on the server. Each process reports its reads later:
with its next put, or after 0.2 s (later if a cache has more than 4 shards). Reports have rising sequence numbers, and
only one report is in flight at a time. If the result of a report is unknown, the report is sent again unchanged. Its
sequence number makes that idempotent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from agentperf_redis.command import WakeUp, running_loop

MAX_READS = 256
"""Maximum distinct keys in one report. Recording them blocks the server for about 1 ms (3-6 us for each key)."""
MAX_PENDING = 16 * MAX_READS
"""Maximum distinct keys buffered while the server is unreachable. Above it, the reads of the oldest keys are lost."""


@dataclass(frozen=True, slots=True)
class AccessReport:
    """One report. Its contents do not change after it was sent for the first time."""

    seq: int
    misses: int
    saved_ms: int
    corrupt: int
    reads: tuple[tuple[str, int], ...]
    """The stored name of each key and the number of its reads; the least recently read key comes first."""


NO_REPORT = AccessReport(0, 0, 0, 0, ())


class AccessBuffer:
    """Gathers reads on any thread and builds reports.

    Args:
        process: returns the identity under which this process reports.
        filled: called, without a lock held, when there is something to report. It is not called again until `take` has
            returned a report.

    Attributes:
        drain: returns the reads that local copies have counted. Each item has a stored name, a count, and the
            computing time saved, ms.
    """

    def __init__(self, process: Callable[[], str], filled: Callable[[], None]) -> None:
        self._process = process
        self._filled = filled
        self.drain: Callable[[], list[tuple[str, int, int]]] = list
        self.start_empty()

    def start_empty(self) -> None:
        """Start empty. Also called in a forked child, since the parent reports the reads from before the fork."""
        self._lock = threading.Lock()
        self._reads: dict[str, int] = {}
        self._misses = self._saved_ms = self._corrupt = 0
        self._seq = 0
        self._open: AccessReport | None = None
        self._unsure = False
        """Whether the open report was sent before and may have been recorded then."""
        self._under_way = False
        self._announced = False
        self.flushing: WakeUp | None = None
        """The wake-up that is sent when the flush in flight ends. Puts wait for it, which keeps the order of
        accesses."""

    @property
    def writer(self) -> str:
        """The identity of the reporting process."""
        return self._process()

    @property
    def is_full(self) -> bool:
        """Whether there are enough reads for a full report."""
        return len(self._reads) >= MAX_READS

    @property
    def waits(self) -> bool:
        """Whether there is anything to report."""
        return bool(self._reads or self._misses or self._corrupt or self._open)

    def read(self, name: str, saved_ms: int) -> None:
        """Record a hit."""
        with self._lock:
            reads = self._reads
            reads[name] = reads.pop(name, 0) + 1  # `pop` first, so that the key moves to the end
            self._saved_ms += saved_ms
            if len(reads) > MAX_PENDING:
                del reads[next(iter(reads))]
        if not self._announced:
            self._announce()

    def found_corrupt(self) -> None:
        """Record that a read found an invalid value. The caller also records the read as a miss."""
        with self._lock:
            self._corrupt += 1
        if not self._announced:
            self._announce()

    def missed(self) -> None:
        """Record a miss."""
        with self._lock:
            self._misses += 1
        if not self._announced:
            self._announce()

    def take(self, *, flush: bool = False) -> AccessReport:
        """Return the next report for sending. Returns NO_REPORT if there is none, or if another report is in flight.

        Args:
            flush: True if the report is sent alone, False if a put carries it.
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

    def settle(self, report: AccessReport, *, confirmed: bool, unused: bool = False) -> None:
        """Record the result of a report. A report that is not confirmed is sent again at the next opportunity.

        Args:
            report: what `take` returned.
            confirmed: whether the server has recorded the report.
            unused: whether the server has certainly not recorded the report in this exchange. If no earlier exchange
                can have recorded it, the report's reads are buffered again, and reported together with later reads, in
                the right order.
        """
        if report is NO_REPORT:
            return
        with self._lock:
            self._under_way = False
            if confirmed:
                self._open, self._unsure = None, False
            elif unused and not self._unsure:
                self._open = None
                self._buffer_again(report)
            else:
                self._unsure = True
            flushing, self.flushing = self.flushing, None
            announce = self.waits and not self._announced
        if flushing is not None:
            flushing.send()
        if announce:
            self._announce()

    def _buffer_again(self, report: AccessReport) -> None:
        later, self._reads = self._reads, dict(report.reads)
        for name, count in later.items():
            self._reads[name] = self._reads.pop(name, 0) + count
        self._misses += report.misses
        self._saved_ms += report.saved_ms
        self._corrupt += report.corrupt

    def announce(self) -> None:
        """Announce that there are reads to report, unless this has already been announced."""
        if not self._announced:
            self._announce()

    def _announce(self) -> None:
        self._announced = True
        self._filled()
