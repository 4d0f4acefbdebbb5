from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.export.histograms import BOUNDS, cumulative, dense, spans_and_deltas
from agentperf_redis.metrics.histogram import bucket_bounds, bucket_index

DURATIONS = st.lists(st.integers(0, 10**11), max_size=60)
BUCKETS = st.dictionaries(st.integers(-330, 420), st.integers(1, 10**12), max_size=40)


@given(DURATIONS)
def test_cumulative_counts_equal_counted_durations(durations_us: list[int]) -> None:
    buckets = Counter(bucket_index(us) for us in durations_us if us)
    counts = cumulative(buckets, durations_us.count(0))
    assert counts == [*(sum(us / 1e6 <= bound for us in durations_us) for bound in BOUNDS), len(durations_us)]


def test_duration_at_a_bound_is_counted_below_it() -> None:
    for place, bound in enumerate(BOUNDS):
        us = bound * 1e6
        if us == int(us):
            assert cumulative({bucket_index(int(us)): 1}, 0)[place - 1 : place + 1] in ([0, 1], [])
            assert cumulative({bucket_index(int(us) + 1): 1}, 0)[place] == 0


def test_bounds_are_bounds_of_stored_buckets() -> None:
    uppers = {bucket_bounds(index)[1] for index in range(-400, 400)}
    assert set(BOUNDS) < uppers


@given(BUCKETS)
def test_spans_and_deltas_hold_every_bucket(buckets: dict[int, int]) -> None:
    spans, deltas = spans_and_deltas(buckets)
    found, index, count, rest = {}, 0, 0, iter(deltas)
    for offset, length in spans:
        index += offset
        for _ in range(length):
            count += next(rest)
            found[index - 1], index = count, index + 1
    assert (found, next(rest, None)) == (buckets, None)
    assert all(offset > 0 for offset, _ in spans[1:]), "adjacent buckets share a span"


@given(BUCKETS)
def test_dense_counts_hold_every_bucket(buckets: dict[int, int]) -> None:
    first, counts = dense(buckets)
    assert {first + place: count for place, count in enumerate(counts) if count} == buckets
    assert not counts or (counts[0] and counts[-1])
