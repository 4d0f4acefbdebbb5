"""What one series got in one step of time: samples added up, and some of them kept as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from heapq import nlargest
from typing import NamedTuple

from agentperf_redis.metrics.histogram import ZERO, bucket_counts
from agentperf_redis.metrics.model import OTHER

RAW_MOST = 1000
"""Raw samples kept of a cell, and of a series on the server."""
SLOW_MOST = 50
"""Slowest samples that are sent on whatever the refill allows."""
COUNTS_MOST = 2000
"""Counters of a cell: 720 buckets at most, and error types; what goes beyond is ``__other__``."""

OK = "ok"
FAILED = "err"
CANCELLED = "cancelled"
MODEL = "mdl:"
_OTHER_ERROR = f"{FAILED}:{OTHER}"


class Series(NamedTuple):
    """A line of counts: an agent, a span of it, a measure of it."""

    shard: int
    name: str
    """Percent-encoded, see `keys.metrics_series`."""


class Part(NamedTuple):
    """A span of an agent by its path, or a further measure such as ``ttft``: recorded under its own name."""

    agent: str
    path: tuple[str, ...] = ()
    measure: str = ""


@lru_cache(maxsize=1024)
def _bucket_field(bucket: int | str) -> str:
    return f"h:{bucket}"


@lru_cache(maxsize=4096)
def _fields_of_outcome(outcome: str) -> tuple[str, ...]:
    if outcome.startswith(FAILED + ":"):
        return FAILED, outcome
    return (outcome,)


Sample = tuple[float, float, str, float]
"""When it ended by our clock, its duration in s, its outcome, and of a span, how much of the time was its own, s."""


def micros(seconds: float) -> int:
    """Round to whole microseconds."""
    return int(seconds * 1e6 + 0.5)


class Cell:
    """What one series got in one step."""

    __slots__ = ("counts", "max_us", "min_us", "newest", "oldest", "raw", "raw_dropped")

    def __init__(self, now: float) -> None:
        self.counts: Counter[str] = Counter()
        self.min_us: int | None = None
        self.max_us = 0
        self.oldest = now
        self.newest = now
        self.raw: list[Sample] = []
        self.raw_dropped = 0

    def fold(self, samples: list[Sample]) -> None:
        """Add samples up, at least one, in order of their end."""
        _, durations, outcomes, own = zip(*samples, strict=True)
        times = sorted([int(seconds * 1e6 + 0.5) for seconds in durations])
        counts = self.counts
        counts["n"] += len(times)
        if outcomes.count(OK) == len(outcomes):
            counts[OK] += len(outcomes)
        else:
            for outcome, count in Counter(outcomes).items():
                for name in _fields_of_outcome(outcome):
                    counts[name if name in counts or len(counts) < COUNTS_MOST else _OTHER_ERROR] += count
        counts["sum_us"] += sum(times)
        own_s = sum(own)
        if own_s:
            counts["self_us"] += micros(own_s)
        buckets, zeros = bucket_counts(times)
        for bucket, count in buckets.items():
            name = _bucket_field(bucket)
            counts[name] = counts.get(name, 0) + count  # a Counter's += is slow where there is none yet
        if zeros:
            counts[_bucket_field(ZERO)] += zeros
        self.min_us = times[0] if self.min_us is None else min(self.min_us, times[0])
        self.max_us = max(self.max_us, times[-1])
        self.oldest = min(self.oldest, samples[0][0])
        self.newest = max(self.newest, samples[-1][0])
        self._keep(samples)

    def merge(self, other: Cell) -> None:
        """Take another cell in."""
        self.counts.update(other.counts)
        if other.min_us is not None:
            self.min_us = other.min_us if self.min_us is None else min(self.min_us, other.min_us)
        self.max_us = max(self.max_us, other.max_us)
        self.oldest = min(self.oldest, other.oldest)
        self.newest = max(self.newest, other.newest)
        self.raw_dropped += other.raw_dropped
        self._keep(other.raw)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to further counters."""
        own = self.counts
        for name, value in counts.items():
            if name not in own and len(own) >= COUNTS_MOST and name.startswith(MODEL):
                name = MODEL + OTHER + name[name.rindex(":") :]  # noqa: PLW2901  counted there instead
            own[name] += value

    def _keep(self, samples: list[Sample]) -> None:
        self.raw.extend(samples)
        self.thin(RAW_MOST)

    def thin(self, allowed: int) -> None:
        """Keep the newest raw samples, as many as allowed, and the slowest."""
        excess = len(self.raw) - allowed
        if excess <= 0:
            return
        early = self.raw[:excess]
        slowest = nlargest(SLOW_MOST, early, key=lambda sample: sample[1]) if allowed < RAW_MOST else []
        self.raw = slowest + self.raw[excess:]
        self.raw_dropped += excess - len(slowest)

    def drop_raw(self) -> None:
        """Keep no raw samples."""
        self.raw_dropped += len(self.raw)
        self.raw = []
