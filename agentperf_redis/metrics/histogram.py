"""Quantiles from counts: base-2 exponential buckets, relative error at most 2.17 %.

Bucket i holds the durations in (2^(i/16), 2^((i+1)/16)] seconds: OpenTelemetry's exponential layout at scale 4. The
scale is fixed, so buckets of any processes, windows and agents add up, and export is lossless.

A quantile is the harmonic middle 2lu/(l+u) of the bucket (l, u] that holds the asked sample. No sample of the bucket is
further from it than (u-l)/(u+l) of itself, which is `RELATIVE_ERROR` for every bucket.

Sources: OpenTelemetry metrics data model, "ExponentialHistogram"; Masson, Rim, Lee: DDSketch (VLDB 2019), lemma 2.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

SCALE = 4
BUCKETS_PER_DOUBLING = 1 << SCALE
_BASE = 2.0 ** (1 / BUCKETS_PER_DOUBLING)
RELATIVE_ERROR = (_BASE - 1) / (_BASE + 1)
"""2.17 %: the bound for every quantile read from buckets, relative to the exact one."""

ZERO = "zero"
"""The bucket of durations that round to 0 us, in place of a number."""


def micros(seconds: float) -> int:
    """Round a duration to whole microseconds, as it is counted."""
    return int(seconds * 1e6 + 0.5)


def bucket_index(us: int) -> int:
    """Return the bucket of a duration in microseconds, at least 1. Two seconds lie in bucket 15, just above in 16."""
    return math.ceil(math.log2(us / 1e6) * BUCKETS_PER_DOUBLING) - 1


@lru_cache(maxsize=1024)
def _max_duration(index: int) -> float:
    """Return the longest duration, in seconds, that lies in a bucket once it is rounded to microseconds."""
    us = int(2.0 ** ((index + 1) / BUCKETS_PER_DOUBLING) * 1e6)
    while bucket_index(us + 1) <= index:
        us += 1
    while us > 1 and bucket_index(us) > index:
        us -= 1
    return _max_duration_rounded_to(us)


def _max_duration_rounded_to(us: int) -> float:
    seconds = (us + 0.5) / 1e6
    while micros(seconds) > us:
        seconds = math.nextafter(seconds, 0.0)
    while micros(after := math.nextafter(seconds, math.inf)) <= us:
        seconds = after
    return seconds


_MAX_ZERO = _max_duration_rounded_to(0)


def bucket_counts(ordered: Sequence[float]) -> tuple[dict[int, int], int]:
    """Count sorted durations, in seconds, by bucket; those that round to 0 us apart.

    Goes from bucket to bucket, not from one to the next: 0.03 us for each of a thousand and as much for sorting them,
    where a logarithm of each takes 0.12.
    """
    counts: dict[int, int] = {}
    zeros = at = bisect_right(ordered, _MAX_ZERO)
    while at < len(ordered):
        index = bucket_index(micros(ordered[at]))
        after = bisect_right(ordered, _max_duration(index), at)
        counts[index] = after - at
        at = after
    return counts, zeros


def bucket_bounds(index: int) -> tuple[float, float]:
    """Return the lower bound (excluded) and the upper bound (included) of a bucket, in seconds."""
    return 2.0 ** (index / BUCKETS_PER_DOUBLING), 2.0 ** ((index + 1) / BUCKETS_PER_DOUBLING)


@lru_cache(maxsize=1024)
def middle(index: int) -> float:
    """Return the estimate for all samples of a bucket, in seconds."""
    low, high = bucket_bounds(index)
    return 2 * low * high / (low + high)


def rank(count: int, quantile: float) -> int:
    """Return which of the sorted samples is the quantile, from 0: the reference's rule, ``sorted[int(n * q)]``."""
    return min(int(count * quantile), count - 1)


def exact_quantile(ordered: Sequence[float], quantile: float) -> float:
    """Return the quantile of sorted samples, at least one."""
    return ordered[rank(len(ordered), quantile)]


def estimated_quantile(
    buckets: Mapping[int, int], zeros: int, quantile: float, *, minimum: float, maximum: float
) -> float:
    """Estimate a quantile from buckets.

    Args:
        buckets: samples for each bucket.
        zeros: samples of 0 us.
        quantile: 0 to 1.
        minimum: the smallest sample, s; the estimate is not below it.
        maximum: the largest sample, s; the estimate is not above it.

    Returns:
        Seconds, within `RELATIVE_ERROR` of the exact quantile; 0.0 when there is no sample.
    """
    (found,) = estimated_quantiles(buckets, zeros, (quantile,), minimum=minimum, maximum=maximum)
    return found


def estimated_quantiles(
    buckets: Mapping[int, int], zeros: int, quantiles: Sequence[float], *, minimum: float, maximum: float
) -> list[float]:
    """Estimate several quantiles at once. Arguments and values as for `estimated_quantile`."""
    count = zeros + sum(buckets.values())
    if count == 0:
        return [0.0] * len(quantiles)
    indexes = sorted(buckets)
    passed = list(accumulate((buckets[index] for index in indexes), initial=zeros))
    found = []
    for quantile in quantiles:
        place = bisect_right(passed, rank(count, quantile))
        found.append(min(max(middle(indexes[place - 1]), minimum), maximum) if place else 0.0)
    return found


def merged(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Add up the buckets of several histograms."""
    total: dict[int, int] = {}
    for buckets in histograms:
        for index, count in buckets.items():
            total[index] = total.get(index, 0) + count
    return total
