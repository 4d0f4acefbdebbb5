"""The records of one series in one time step: sums of its samples, and some raw samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from heapq import nlargest
from typing import Any, NamedTuple

from agentperf_redis.metrics.histogram import ZERO, bucket_counts, micros
from agentperf_redis.metrics.model import OTHER

MAX_RAW = 1000
"""Maximum number of raw samples in an accumulator, and maximum number per series on the server."""
MAX_SLOW = 50
"""Number of the slowest samples that an accumulator sends in addition to the samples that the rate limit allows."""
MAX_COUNTERS = 2000
"""Maximum number of counters in an accumulator. At most 720 of them are buckets, and most others are error types. Error
types beyond the limit are counted as ``__other__``."""

OK = "ok"
FAILED = "err"
CANCELLED = "cancelled"
MODEL = "mdl:"
_OTHER_ERROR = f"{FAILED}:{OTHER}"


class Series(NamedTuple):
    """The name and shard of the counters of an agent, of one of its spans, or of one of its measures."""

    shard: int
    name: str
    """The name of the series, percent-encoded; see `keys.metrics_series`."""


class Part(NamedTuple):
    """A part of an agent: a span, named by its path, or a measure such as ``ttft``. Each part has its own series."""

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


Samples = list[Any]
"""Executions in the order of their ends. Each takes four consecutive items of the list: its end by the process's clock,
its duration in s, its outcome, and for a span its self time in s. The list is flat, so a record creates no object for
the garbage collector, and a slice of the list is a column.
"""
ITEMS = 4
_ENDED, _SECONDS, _OUTCOME, _OWN = range(ITEMS)


class Accumulator:
    """The records of one series in one time step."""

    __slots__ = ("counts", "max_us", "min_us", "newest", "oldest", "raw", "raw_dropped")

    def __init__(self, now: float) -> None:
        self.counts: Counter[str] = Counter()
        self.min_us: int | None = None
        self.max_us = 0
        self.oldest = now
        self.newest = now
        self.raw: Samples = []
        self.raw_dropped = 0

    def aggregate(self, samples: Samples) -> None:
        """Add samples to the sums. There must be at least one sample."""
        durations = sorted(samples[_SECONDS::ITEMS])
        counts = self.counts
        counts["n"] += len(durations)
        outcomes = samples[_OUTCOME::ITEMS]
        if outcomes.count(OK) == len(outcomes):
            counts[OK] += len(outcomes)
        else:
            for outcome, count in Counter(outcomes).items():
                for name in _fields_of_outcome(outcome):
                    counts[name if name in counts or len(counts) < MAX_COUNTERS else _OTHER_ERROR] += count
        counts["sum_us"] += micros(sum(durations))  # rounded once: more exact than a sum of rounded values, and faster
        own_s = sum(samples[_OWN::ITEMS])
        if own_s:
            counts["self_us"] += micros(own_s)
        buckets, zeros = bucket_counts(durations)
        for bucket, count in buckets.items():
            name = _bucket_field(bucket)
            counts[name] = counts.get(name, 0) + count  # += of a Counter is slow for a new key
        if zeros:
            counts[_bucket_field(ZERO)] += zeros
        minimum, maximum = micros(durations[0]), micros(durations[-1])
        self.min_us = minimum if self.min_us is None else min(self.min_us, minimum)
        self.max_us = max(self.max_us, maximum)
        self.oldest = min(self.oldest, samples[_ENDED])
        self.newest = max(self.newest, samples[_ENDED - ITEMS])
        self._keep(samples)

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator to this one."""
        self.counts.update(other.counts)
        if other.min_us is not None:
            self.min_us = other.min_us if self.min_us is None else min(self.min_us, other.min_us)
        self.max_us = max(self.max_us, other.max_us)
        self.oldest = min(self.oldest, other.oldest)
        self.newest = max(self.newest, other.newest)
        self.raw_dropped += other.raw_dropped
        self._keep(other.raw)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to counters that do not count executions, such as tokens."""
        own = self.counts
        for name, value in counts.items():
            if name not in own and len(own) >= MAX_COUNTERS and name.startswith(MODEL):
                name = MODEL + OTHER + name[name.rindex(":") :]  # noqa: PLW2901  beyond the limit: counts as __other__
            own[name] += value

    def _keep(self, samples: Samples) -> None:
        self.raw += samples
        self.sample(MAX_RAW)

    @property
    def raw_count(self) -> int:
        """Number of raw samples in this accumulator."""
        return len(self.raw) // ITEMS

    def sample(self, allowed: int) -> None:
        """Drop raw samples beyond `allowed`, the oldest first, but keep the slowest."""
        excess = self.raw_count - allowed
        if excess <= 0:
            return
        kept = self.raw[excess * ITEMS :]
        if allowed < MAX_RAW:
            slowest = slowest_of(self.raw[: excess * ITEMS])
            kept = [item for index in slowest for item in self.raw[index * ITEMS : index * ITEMS + ITEMS]] + kept
            excess -= len(slowest)
        self.raw = kept
        self.raw_dropped += excess

    def drop_raw(self) -> None:
        """Keep no raw samples."""
        self.raw_dropped += self.raw_count
        self.raw = []


def columns(samples: Samples) -> Iterator[tuple[float, float, str]]:
    """Return the end, the duration and the outcome of each sample."""
    return zip(samples[_ENDED::ITEMS], samples[_SECONDS::ITEMS], samples[_OUTCOME::ITEMS], strict=True)


def slowest_of(samples: Samples) -> list[int]:
    """Return the indexes of the slowest samples, the slowest first."""
    durations = samples[_SECONDS::ITEMS]
    return nlargest(MAX_SLOW, range(len(durations)), key=durations.__getitem__)
