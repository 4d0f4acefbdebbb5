"""Conversions of stored buckets: classic and native histograms of Prometheus, exponential histograms of OpenTelemetry.

All of them are exact. OpenTelemetry has the same buckets. Prometheus numbers them by their upper bound, so its index is
one larger. The bounds of classic buckets are powers of two, which are bounds of stored buckets too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from agentperf_redis.metrics.histogram import BUCKETS_PER_DOUBLING

FIRST_EXPONENT, LAST_EXPONENT = -10, 12
"""Classic buckets reach from 1 ms to 68 minutes. All agents have the same ones, as sums over agents need them."""
BOUNDS = tuple(2.0**exponent for exponent in range(FIRST_EXPONENT, LAST_EXPONENT + 1))
"""Upper bounds of the classic buckets, s, except the last bucket, whose bound is infinite."""


def cumulative(buckets: Mapping[int, int], zeros: int) -> list[int]:
    """Return the number of durations up to each bound of `BOUNDS`, and last the number of all."""
    counts = [0] * (len(BOUNDS) + 1)
    counts[0] = zeros
    last = len(BOUNDS)
    for index, count in buckets.items():
        place = index // BUCKETS_PER_DOUBLING + 1 - FIRST_EXPONENT
        counts[0 if place < 0 else min(place, last)] += count
    return list(accumulate(counts))


def spans_and_deltas(buckets: Mapping[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the buckets as a native histogram has them.

    Returns:
        The spans of adjacent buckets: (index of the first one for the first span, number of empty buckets before it for
        the others; number of buckets). Then the counts, the first one absolute, the others relative to the one before.
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
    """Return the index of the first bucket, and the counts from it to the last one, empty buckets included."""
    if not buckets:
        return 0, []
    first = min(buckets)
    return first, [buckets.get(index, 0) for index in range(first, max(buckets) + 1)]
