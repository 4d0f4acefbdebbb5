"""Conversions of stored buckets: classic and native histograms of Prometheus, exponential histograms of OpenTelemetry.

All conversions are exact. OpenTelemetry has the same buckets with the same indexes. Prometheus numbers a bucket by its
upper bound, so an index in Prometheus is one larger. The bounds of classic buckets are powers of two, and each of these
powers is also the bound of a stored bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from agentperf_redis.metrics.histogram import BUCKETS_PER_DOUBLING

FIRST_EXPONENT, LAST_EXPONENT = -10, 12
"""Exponents of the bounds of the classic buckets, which reach from 1 ms to 68 minutes. All agents have the same
buckets, because sums over agents need equal buckets."""
BOUNDS = tuple(2.0**exponent for exponent in range(FIRST_EXPONENT, LAST_EXPONENT + 1))
"""Upper bounds of the classic buckets, s, except the last bucket, whose bound is infinite."""


def cumulative(buckets: Mapping[int, int], zeros: int) -> list[int]:
    """Return the number of durations up to each bound of `BOUNDS`, followed by the number of all durations."""
    counts = [0] * (len(BOUNDS) + 1)
    counts[0] = zeros
    last = len(BOUNDS)
    for index, count in buckets.items():
        place = index // BUCKETS_PER_DOUBLING + 1 - FIRST_EXPONENT
        counts[0 if place < 0 else min(place, last)] += count
    return list(accumulate(counts))


def spans_and_deltas(buckets: Mapping[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the buckets in the form of a native histogram.

    Returns:
        The spans and the counts. A span is a run of adjacent buckets: (offset, number of buckets). The offset of the
        first span is the index of its first bucket. The offset of any other span is the number of empty buckets before
        the span. The first count is absolute. Any other count is the difference from the count before.
    """
    spans: list[tuple[int, int]] = []
    deltas: list[int] = []
    before, count_before = None, 0
    for index in sorted(buckets):
        if before is not None and index == before + 1:
            offset, length = spans[-1]
            spans[-1] = offset, length + 1
        else:
            spans.append((index + 1 if before is None else index - before - 1, 1))
        deltas.append(buckets[index] - count_before)
        before, count_before = index, buckets[index]
    return spans, deltas


def dense(buckets: Mapping[int, int]) -> tuple[int, list[int]]:
    """Return the index of the first bucket, and the counts of the first to the last bucket, empty ones included."""
    if not buckets:
        return 0, []
    first = min(buckets)
    return first, [buckets.get(index, 0) for index in range(first, max(buckets) + 1)]
