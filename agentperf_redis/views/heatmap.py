"""A latency heat map: for each step, the number of executions in each range of durations. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentperf_redis.metrics.histogram import BUCKETS_PER_DOUBLING
from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.windows import Interval

_MAX_BANDS = 24


@dataclass(frozen=True, slots=True)
class Band:
    """The executions whose durations are in one range.

    Attributes:
        low: lower bound of the durations (exclusive), s; 0.0 in the first band if it also holds durations of 0 us.
        high: upper bound of the durations (inclusive), s.
        counts: number of executions, for each step.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heatmap:
    """The heat map of an agent. Its counts are exact, because a bound of a band is also a bound of a histogram bucket.

    Attributes:
        steps: the steps.
        bands: adjacent ranges of durations, the shortest first; empty without executions.
        peak: the largest count of all cells.
    """

    steps: tuple[Interval, ...]
    bands: tuple[Band, ...]
    peak: int


def heatmap_of(rows: Sequence[SeriesRow]) -> Heatmap:
    """Make an agent's heat map. The bounds of a band differ by a factor of sqrt(2), or more to avoid too many bands."""
    steps = tuple(row.interval for row in rows)
    indexes = [index for row in rows for index in row.buckets]
    zeros = any(row.zeros for row in rows)
    if not indexes:
        counts = tuple(row.zeros for row in rows)
        bands = (Band(0.0, 0.5e-6, counts),) if zeros else ()
        return Heatmap(steps, bands, max(counts, default=0))
    low, high = min(indexes), max(indexes)
    width = BUCKETS_PER_DOUBLING // 2
    while high // width - low // width >= _MAX_BANDS:
        width *= 2
    first, last = low // width, high // width
    cells = [[0] * len(rows) for _ in range(first, last + 1)]
    for at, row in enumerate(rows):
        for index, count in row.buckets.items():
            cells[index // width - first][at] += count
        cells[0][at] += row.zeros
    bounds = [2.0 ** (band * width / BUCKETS_PER_DOUBLING) for band in range(first, last + 2)]
    if zeros:
        bounds[0] = 0.0
    made = tuple(Band(bounds[at], bounds[at + 1], tuple(counts)) for at, counts in enumerate(cells))
    return Heatmap(steps, made, max(max(counts) for counts in cells))
