"""The heat map counts each execution once, in the band of its duration."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.metrics.histogram import bucket_counts
from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.views.heatmap import heatmap_of
from agentperf_redis.windows import Interval


def row(number: int, durations: list[float]) -> SeriesRow:
    buckets, zeros = bucket_counts(sorted(durations))
    return SeriesRow(Interval(60.0 * number, 60.0 * number + 60), len(durations), buckets=buckets, zeros=zeros)


@given(st.lists(st.lists(st.floats(0, 1e5), max_size=20), max_size=8))
def test_each_execution_is_counted_once(steps: list[list[float]]) -> None:
    found = heatmap_of([row(number, durations) for number, durations in enumerate(steps)])
    assert len(found.steps) == len(steps)
    assert len(found.bands) <= 24
    for at, durations in enumerate(steps):
        assert sum(band.counts[at] for band in found.bands) == len(durations)
    assert found.peak == max((count for band in found.bands for count in band.counts), default=0)
    for below, above in zip(found.bands, found.bands[1:], strict=False):
        assert below.high == above.low


def test_executions_are_in_the_band_of_their_duration() -> None:
    source = random.Random(1)
    durations = [source.lognormvariate(0, 1) for _ in range(500)]
    found = heatmap_of([row(0, durations)])
    for band in found.bands:
        exact = sum(band.low < each <= band.high for each in durations)
        assert band.counts == (exact,)


def test_steps_without_executions_have_no_bands() -> None:
    found = heatmap_of([row(0, []), row(1, [])])
    assert (found.bands, found.peak, len(found.steps)) == ((), 0, 2)


def test_durations_of_zero_are_in_the_first_band() -> None:
    alone = heatmap_of([row(0, [0.0, 0.0])])
    assert [band.counts for band in alone.bands] == [(2,)]
    found = heatmap_of([row(0, [0.0, 1.0])])
    assert found.bands[0].low == 0.0
    assert found.bands[0].counts == (2,)
