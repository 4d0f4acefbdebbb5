from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.metrics.histogram import (
    RELATIVE_ERROR,
    bucket_bounds,
    bucket_counts,
    bucket_index,
    estimated_quantile,
    exact_quantile,
    merged,
    micros,
    middle,
    rank,
)
from tests.support.distributions import DISTRIBUTIONS

SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
YEAR_US = 366 * 86_400 * 10**6


def estimate(times_us: list[int], share: float) -> float:
    buckets = Counter(bucket_index(us) for us in times_us if us)
    zeros = times_us.count(0)
    return estimated_quantile(buckets, zeros, share, minimum=min(times_us) / 1e6, maximum=max(times_us) / 1e6)


def test_error_bound_is_the_documented_one() -> None:
    assert f"{RELATIVE_ERROR:.2%}" == "2.17%"


@given(st.integers(1, YEAR_US))
def test_duration_lies_in_its_bucket_near_the_middle(us: int) -> None:
    index = bucket_index(us)
    low, high = bucket_bounds(index)
    assert low * (1 - 1e-12) < us / 1e6 <= high * (1 + 1e-12)
    assert abs(middle(index) - us / 1e6) <= RELATIVE_ERROR * (us / 1e6) * (1 + 1e-9)


durations = st.floats(0, YEAR_US / 1e6) | st.integers(0, YEAR_US).map(lambda us: us / 1e6)
# Durations near the bounds of buckets. Their bucket depends on the rounding to whole microseconds.
ends = st.integers(-320, 395).flatmap(
    lambda index: st.floats(-1.0, 1.0).map(lambda us: max(0.0, bucket_bounds(index)[1] + us / 1e6))
)


@given(st.lists(durations | ends, max_size=100))
def test_bucket_counts_equal_single_counts(seconds: list[float]) -> None:
    times = [micros(each) for each in seconds]
    assert bucket_counts(sorted(seconds)) == (dict(Counter(bucket_index(us) for us in times if us)), times.count(0))


def test_powers_of_two_end_their_bucket() -> None:
    for exponent in range(-6, 20):
        us = 2**exponent * 10**6 if exponent >= 0 else 10**6 // 2**-exponent
        assert bucket_index(us) == 16 * exponent - 1
        assert bucket_index(us + 1) == 16 * exponent


def test_rank_follows_the_in_memory_version() -> None:
    for count in range(1, 300):
        ordered = list(range(count))
        for share in (0.5, 0.95, 0.99):
            assert exact_quantile(ordered, share) == ordered[int(count * share)]
        assert rank(count, 1.0) == count - 1


@pytest.mark.parametrize("size", [100, 1_000, 10_000, 100_000, pytest.param(1_000_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantiles_of_distributions_are_within_the_bound(name: str, size: int) -> None:
    drawn = DISTRIBUTIONS[name](np.random.default_rng(size), size)
    times: list[int] = np.sort(np.maximum(0, np.rint(drawn * 1e6)).astype(np.int64)).tolist()
    buckets, zeros = bucket_counts([us / 1e6 for us in times])
    for share in SHARES:
        exact = exact_quantile(times, share) / 1e6
        found = estimated_quantile(buckets, zeros, share, minimum=times[0] / 1e6, maximum=times[-1] / 1e6)
        assert abs(found - exact) <= RELATIVE_ERROR * exact * (1 + 1e-9), share


@given(st.lists(st.integers(0, YEAR_US), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_of_any_data_are_within_the_bound(times: list[int], share: float) -> None:
    exact = exact_quantile(sorted(times), share) / 1e6
    assert math.isclose(estimate(times, share), exact, rel_tol=RELATIVE_ERROR * (1 + 1e-9), abs_tol=0.0) or (
        abs(estimate(times, share) - exact) <= RELATIVE_ERROR * exact
    )


@given(st.lists(st.lists(st.integers(1, YEAR_US), max_size=50), max_size=5))
def test_merged_histograms_equal_the_combined_histogram(parts: list[list[int]]) -> None:
    histograms = [Counter(map(bucket_index, part)) for part in parts]
    assert merged(histograms) == dict(Counter(bucket_index(us) for part in parts for us in part))


def test_quantile_of_no_samples_is_zero() -> None:
    assert estimated_quantile({}, 0, 0.5, minimum=math.inf, maximum=0.0) == 0.0
