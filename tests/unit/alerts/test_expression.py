from __future__ import annotations

import pytest

from agentperf_redis.alerts.expression import Scope, Truth, parsed, resolving, share_of, value_text
from agentperf_redis.errors import InvalidArgument

AGENTS, CACHE, POOL = Scope.AGENTS, Scope.CACHE, Scope.POOL


@pytest.mark.parametrize(
    ("text", "scope", "measure", "threshold"),
    [
        ("p95 > 2s", AGENTS, "p95", 2.0),
        ("p99.9>=250ms", AGENTS, "p99.9", 0.25),
        ("avg < 3m", AGENTS, "avg", 180.0),
        ("max > 500us", AGENTS, "max", 0.0005),
        ("failure_rate > 5%", AGENTS, "failure_rate", 0.05),
        ("success_rate <= 0.9", AGENTS, "success_rate", 0.9),
        ("tasks < 1", AGENTS, "tasks", 1.0),
        ("tokens > 2M", AGENTS, "tokens", 2e6),
        ("throughput < 30/min", AGENTS, "throughput", 0.5),
        ("hit_rate < 80%", CACHE, "hit_rate", 0.8),
        ("bytes > 2GiB", CACHE, "bytes", 2.0 * 2**30),
        ("bytes > 500MB", CACHE, "bytes", 5e8),
        ("waiters > 10", POOL, "waiters", 10.0),
        ("unfit >= 1", POOL, "unhealthy", 1.0),
        ("load > 90%", POOL, "load", 0.9),
        ("load > 90", POOL, "load", 90.0),
    ],
)
def test_condition_is_parsed(text: str, scope: Scope, measure: str, threshold: float) -> None:
    condition = parsed("when", text, scope)
    assert condition.measure == measure
    assert condition.threshold == pytest.approx(threshold)
    assert condition.is_relative == (text == "load > 90%")


@pytest.mark.parametrize(
    ("text", "scope", "complaint"),
    [
        ("p95", AGENTS, "such as 'p95 > 2s'"),
        ("p95 = 2s", AGENTS, "one of > >= < <="),
        (5, AGENTS, "such as 'p95 > 2s'"),
        (None, CACHE, "such as 'hit_rate < 80%'"),
        ("p95 > 2", AGENTS, "with its unit"),
        ("p95 > 2%", AGENTS, "with its unit"),
        ("p0 > 2s", AGENTS, "a measure of agents"),
        ("p100 > 2s", AGENTS, "a measure of agents"),
        ("latency > 2s", AGENTS, "p50, p90, p95, p99, p99.9, avg"),
        ("hit_rate > 5%", AGENTS, "a measure of agents"),
        ("p95 > 2s", CACHE, "a measure of cache: hit_rate, size, bytes, evictions"),
        ("failure_rate > 5", AGENTS, "at most 100%"),
        ("failure_rate > 100%", AGENTS, "some value can fulfil"),
        ("tasks < 0", AGENTS, "some value can fulfil"),
        ("tasks >= 0", AGENTS, "not every value fulfils"),
        ("hit_rate <= 100%", CACHE, "not every value fulfils"),
        ("tasks > 1.2.3", AGENTS, "a number such as 20"),
        ("waiters > 10s", POOL, "a number such as 20"),
        ("load > 120%", POOL, "at most 100%"),
        ("p95 > 2s; drop", AGENTS, "such as 'p95 > 2s'"),
    ],
)
def test_invalid_condition_names_what_is_allowed(text: object, scope: Scope, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parsed("when", text, scope)
    assert refused.value.argument == "when"
    assert complaint in refused.value.allowed


@pytest.mark.parametrize(
    ("text", "low", "high", "truth"),
    [
        ("p95 > 2s", 2.1, 2.2, Truth.TRUE),
        ("p95 > 2s", 1.9, 2.0, Truth.FALSE),
        ("p95 > 2s", 1.9, 2.1, Truth.UNDECIDED),
        ("p95 >= 2s", 2.0, 2.0, Truth.TRUE),
        ("p95 < 2s", 2.0, 2.0, Truth.FALSE),
        ("p95 <= 2s", 1.0, 2.0, Truth.TRUE),
        ("p95 <= 2s", 1.0, 2.1, Truth.UNDECIDED),
    ],
)
def test_truth_needs_the_whole_interval(text: str, low: float, high: float, truth: Truth) -> None:
    assert parsed("when", text, AGENTS).truth(low, high) is truth


@pytest.mark.parametrize(
    ("when", "resolve", "is_valid"),
    [
        ("p95 > 2s", "p95 < 1.5s", True),
        ("p95 > 2s", "p95 <= 2s", True),
        ("p95 >= 2s", "p95 < 2s", True),
        ("p95 >= 2s", "p95 <= 2s", False),
        ("p95 > 2s", "p95 < 2.5s", False),
        ("p95 > 2s", "p95 > 1s", False),
        ("p95 > 2s", "p50 < 1s", False),
        ("success_rate < 90%", "success_rate > 95%", True),
        ("success_rate < 90%", "success_rate > 85%", False),
    ],
)
def test_resolving_condition_never_overlaps_when(when: str, resolve: str, is_valid: bool) -> None:
    condition = parsed("when", when, AGENTS)
    if is_valid:
        assert resolving("resolve", resolve, condition, AGENTS).text == resolve
    else:
        with pytest.raises(InvalidArgument, match="resolve is"):
            resolving("resolve", resolve, condition, AGENTS)


def test_share_of_percentile() -> None:
    assert [share_of(name) for name in ("p50", "p99.9", "avg", "p")] == [0.5, pytest.approx(0.999), 0.0, 0.0]


@pytest.mark.parametrize(
    ("measure", "value", "text"),
    [
        ("p95", 2.3123, "2.312 s"),
        ("p95", 0.0025, "2.5 ms"),
        ("failure_rate", 0.0721, "7.21%"),
        ("tasks", 1200.0, "1200"),
        ("throughput", 0.5, "0.5/s"),
        ("burn rate", 14.5, "14.5"),
    ],
)
def test_value_is_shown_with_its_unit(measure: str, value: float, text: str) -> None:
    assert value_text(measure, value) == text
