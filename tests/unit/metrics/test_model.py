from __future__ import annotations

import random
import time
from collections import Counter
from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.comparison import compared
from agentperf_redis.metrics.counters import Counters, added, performance
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, bucket_index
from agentperf_redis.metrics.model import Interval, PerformanceMetrics, system_summary
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.windows import TimeRange, asked_time, local_timestamp


def counters(times_us: list[int], failures: int = 0, *, whole: bool = True, end_ms: int = 11_000) -> Counters:
    return Counters(
        counts={
            "n": len(times_us),
            "ok": len(times_us) - failures,
            "err": failures,
            "sum_us": sum(times_us),
            "min_us": min(times_us),
            "max_us": max(times_us),
            "first_ms": 1000,
            "last_ms": 10_000,
        },
        errors={"TimeoutError": failures} if failures else {},
        buckets=dict(Counter(map(bucket_index, times_us))),
        models={},
        durations_us=tuple(times_us) if whole else (),
        interval_ms=(1000, end_ms),
    )


def test_summary_has_the_in_memory_shape() -> None:
    metrics = performance("research", counters([1_000_000, 2_000_000, 3_000_000, 4_000_000], failures=1))
    assert metrics.get_summary() == {
        "agent_name": "research",
        "task_count": 4,
        "success_rate": "75.0%",
        "failure_rate": "25.0%",
        "avg_execution_time": "2.50s",
        "p50_execution_time": "3.00s",
        "p95_execution_time": "4.00s",
        "p99_execution_time": "4.00s",
        "min_execution_time": "1.00s",
        "max_execution_time": "4.00s",
        "top_errors": {"TimeoutError": 1},
    }


def test_agent_without_executions_is_all_zeros() -> None:
    metrics = performance("unknown", Counters({}, {}, {}, {}, (), (0, 0)))
    assert metrics == PerformanceMetrics("unknown")
    assert (metrics.success_rate, metrics.failure_rate, metrics.quantile(0.5)) == (0.0, 0.0, 0.0)
    assert metrics.get_summary()["min_execution_time"] == "infs"


def test_top_errors_are_the_five_most_frequent() -> None:
    errors = {f"E{number}": number for number in range(1, 9)}
    assert PerformanceMetrics("x", error_types=errors).get_summary()["top_errors"] == {
        f"E{number}": number for number in range(8, 3, -1)
    }


def test_percentiles_are_exact_only_with_all_samples() -> None:
    source = random.Random(5)
    times = [round(source.lognormvariate(0.7, 0.8) * 1e6) for _ in range(700)]
    ordered = sorted(times)
    exact = performance("research", counters(times))
    rough = performance("research", counters(times, whole=False))
    assert (exact.exact, exact.error_bound) == (True, 0.0)
    assert (rough.exact, rough.error_bound) == (False, RELATIVE_ERROR)
    for share, at_exact, at_rough in (
        (0.5, exact.p50_execution_time, rough.p50_execution_time),
        (0.95, exact.p95_execution_time, rough.p95_execution_time),
        (0.99, exact.p99_execution_time, rough.p99_execution_time),
        (0.9, exact.quantile(0.9), rough.quantile(0.9)),
    ):
        truth = ordered[int(700 * share)] / 1e6
        assert at_exact == truth
        assert abs(at_rough - truth) <= RELATIVE_ERROR * truth


def test_added_counters_equal_the_combined_counters() -> None:
    first, second = [5, 7, 100], [1, 1_000_000]
    both = added([counters(first, 1), counters(second, 2, end_ms=20_000)])
    assert both == Counters(
        counts={**counters(first + second, 3).counts, "first_ms": 1000},
        errors={"TimeoutError": 3},
        buckets=counters(first + second).buckets,
        models={},
        durations_us=(5, 7, 100, 1, 1_000_000),
        interval_ms=(1000, 20_000),
    )


def test_missing_samples_of_a_part_make_the_sum_inexact() -> None:
    both = added([counters([5, 7]), counters([9], whole=False)])
    assert both.durations_us == ()
    assert not performance("x", both).exact


def test_system_summary_has_the_in_memory_shape() -> None:
    agents = [
        performance("slow", counters([3_000_000, 3_000_000])),
        performance("failing", counters([1_000_000, 1_000_000], failures=2)),
        performance("fast", counters([500_000, 500_000])),
        PerformanceMetrics("idle"),
    ]
    assert system_summary(agents).rendered() == {
        "uptime": "10s",
        "total_tasks": 6,
        "total_successes": 4,
        "total_failures": 2,
        "overall_success_rate": "66.7%",
        "throughput": "0.60 tasks/s",
        "active_agents": 3,
        "agent_rankings": [
            {"agent": "fast", "score": "0.667", "success_rate": "100.0%", "avg_time": "0.50s"},
            {"agent": "slow", "score": "0.250", "success_rate": "100.0%", "avg_time": "3.00s"},
            {"agent": "failing", "score": "0.000", "success_rate": "0.0%", "avg_time": "1.00s"},
        ],
    }


def test_empty_system_summary_has_the_in_memory_values() -> None:
    assert system_summary([]).rendered() == {
        "uptime": "0s",
        "total_tasks": 0,
        "total_successes": 0,
        "total_failures": 0,
        "overall_success_rate": "0%",
        "throughput": "0 tasks/s",
        "active_agents": 0,
        "agent_rankings": [],
    }


def test_throughput_uses_the_covered_time_range() -> None:
    assert PerformanceMetrics("x", task_count=30, interval=Interval(100.0, 110.0)).throughput == 3.0


@pytest.mark.parametrize(
    ("window", "expected_ms"),
    [
        ("30s", 30_000),
        ("5m", 300_000),
        ("1h", 3_600_000),
        ("3d", 259_200_000),
        ("1.5h", 5_400_000),
        (90, 90_000),
        (1.5, 1500),
    ],
)
def test_valid_windows_are_converted(window: str | float, expected_ms: int) -> None:
    assert asked_time(window, None) == TimeRange(expected_ms, -1)
    assert asked_time(window, 1000.5) == TimeRange(expected_ms, 1_000_500)


@pytest.mark.parametrize(
    "window",
    ["", "m", "5", "5 m", "-5m", "5w", "nan", "nans", "infs", "1e3s", "٣m", "0s", "9999999d", 0, -1, True, [], b"5m",
     float("nan"), float("inf")],
)  # fmt: skip
def test_invalid_windows_are_rejected(window: str) -> None:
    with pytest.raises(InvalidArgument, match="window"):
        asked_time(window, None)


@pytest.mark.parametrize(
    "as_of",
    ["now", True, float("nan"), float("inf"), -1, 1e300, [], date(2026, 1, 1), 1_764_100_000_000, datetime(1, 1, 1),  # noqa: DTZ001
     datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))), datetime(1969, 1, 1, tzinfo=UTC)],
)  # fmt: skip
def test_invalid_timestamps_are_rejected(as_of: float) -> None:
    with pytest.raises(InvalidArgument, match="as_of"):
        asked_time("5m", as_of)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_all_timestamp_forms_mean_the_same(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        # `seconds` is an hour before the clocks in New York are set back. 5,400 s later, half of the repeated hour has
        # passed.
        seconds = 1_793_509_200.125
        for as_of in (seconds, seconds + 5400.0):
            aware = datetime.fromtimestamp(as_of, timezone(timedelta(hours=9)))
            local = datetime.fromtimestamp(as_of)  # noqa: DTZ006  the form under test
            ms = round(as_of * 1000)
            for given in (as_of, aware, local):
                assert asked_time("5m", given) == TimeRange(300_000, ms)
            assert local_timestamp(ms) == local
            assert asked_time("5m", local_timestamp(ms)).as_of_ms == ms, "timestamps of results are valid arguments"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_all_time_has_no_history() -> None:
    with pytest.raises(InvalidArgument, match="as_of"):
        asked_time(None, 1000.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slices_10s", -1),
        ("slices_1d", float("inf")),
        ("slices_10s", 2 * 86_400),
        ("recent", 0),
        ("recent_count", 1001),
        ("slow", "1h"),
    ],
)
def test_invalid_retention_is_rejected(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=field):
        Retention(**{field: value})  # type: ignore[arg-type]  # one field is an int


@pytest.mark.parametrize("share", [95, 1.5, -0.1, float("nan"), "p95", None, True])
def test_invalid_quantile_share_is_rejected(share: object) -> None:
    metrics = performance("research", counters([1_000_000] * 20))
    with pytest.raises(InvalidArgument, match=r"share .* a number from 0 to 1"):
        metrics.quantile(share)  # type: ignore[arg-type]  # invalid on purpose


def test_comparison_with_an_idle_agent_has_few_certain_changes() -> None:
    busy, idle = (
        performance("busy", counters([200_000] * 4, failures=1)),
        performance("idle", Counters({}, {}, {}, {}, (), (0, 0))),
    )
    for first, second in ((busy, idle), (idle, busy)):
        found = compared(first, second)
        assert {change.name for change in found.changes if change.certain} == {"task_count", "throughput"}
