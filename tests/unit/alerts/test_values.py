from __future__ import annotations

import math
from dataclasses import replace

import pytest

from agentperf_redis.alerts.evaluation import Verdict
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.alerts.values import (
    Totals,
    bucket_value,
    burn_counts,
    judged_agent,
    judged_cache,
    judged_pool,
    measured_agent,
)
from agentperf_redis.balancer.model import AgentInstance, InstanceStatus, LoadBalancingStrategy, PoolStatus
from agentperf_redis.cache.model import CacheStats, Settings, TierStats
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, bucket_counts
from agentperf_redis.metrics.model import Interval

WINDOW = Interval(0.0, 300.0)


def totals(durations: list[float], *, errors: int = 0, cancelled: int = 0) -> Totals:
    buckets, zeros = bucket_counts(sorted(durations))
    return Totals(
        len(durations),
        errors,
        cancelled,
        round(sum(durations) * 1e6),
        max(durations, default=0.0),
        30,
        0.5,
        buckets,
        zeros,
        WINDOW,
    )


def alert(fields: str) -> Rule:
    (made,) = read_rules(f'[[alert]]\nname = "a"\n{fields}').rules
    return made


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("avg", 2.5),
        ("max", 4.0),
        ("failure_rate", 0.25),
        ("success_rate", 0.5),
        ("tasks", 4.0),
        ("errors", 1.0),
        ("throughput", 4 / 300),
        ("tokens", 30.0),
        ("cost", 0.5),
    ],
)
def test_measures_of_an_agent(measure: str, value: float) -> None:
    found = measured_agent(measure, totals([1.0, 2.0, 3.0, 4.0], errors=1, cancelled=1))
    assert [found.value, found.low, found.high] == pytest.approx([value] * 3)
    assert found.events == 4


@pytest.mark.parametrize(("measure", "exact"), [("p50", 3.0), ("p95", 4.0), ("p10", 1.0), ("p99.9", 4.0)])
def test_percentile_is_an_interval_around_the_exact_one(measure: str, exact: float) -> None:
    found = measured_agent(measure, totals([1.0, 2.0, 3.0, 4.0]))
    assert found.low <= exact <= found.high
    assert found.high / found.low <= (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR) * (1 + 1e-9)
    assert found.low <= found.value <= found.high


def test_windows_without_executions_and_with_zero_durations() -> None:
    assert measured_agent("p95", totals([])).events == 0
    assert measured_agent("avg", totals([])).value == 0.0
    assert measured_agent("p95", totals([0.0, 0.0])).high == 5e-7


def test_power_of_two_is_an_exact_threshold() -> None:
    rule = alert('agents = "x"\nwhen = "p50 > 2s"\nmin_events = 1')
    assert judged_agent(rule, {300.0: totals([2.0])})[0] is Verdict.CLEAR
    assert judged_agent(rule, {300.0: totals([2.000002])})[0] is Verdict.HOLDS
    low, high = bucket_value(16)[1:]
    assert low > 2.0 > bucket_value(15)[1]
    assert high > low


def test_burn_rate_counts_failures_or_slow_executions() -> None:
    succeeds, _ = read_rules('[[slo]]\nname = "s"\nagents = "x"\nobjective = "99%"').rules
    fast, _ = read_rules('[[slo]]\nname = "s"\nagents = "x"\nobjective = "95% under 2s"').rules
    between, _ = read_rules('[[slo]]\nname = "s"\nagents = "x"\nobjective = "95% under 2.05s"').rules
    of = totals([1.0, 2.0, 2.07, 3.0], errors=1)
    assert (burn_counts(succeeds, of).bad_low, burn_counts(succeeds, of).bad_high) == (1, 1)
    assert (burn_counts(fast, of).bad_low, burn_counts(fast, of).bad_high) == (2, 2)
    assert (burn_counts(between, of).bad_low, burn_counts(between, of).bad_high) == (1, 2)
    found, measured = judged_agent(succeeds, dict.fromkeys(succeeds.windows, replace(of, tasks=100, errors=50)))
    assert found is Verdict.HOLDS
    assert measured is not None
    assert measured.value == pytest.approx(50.0)


def cache(hits: int, misses: int, evictions: int = 0) -> CacheStats:
    settings = Settings.parse("lru capacity 0/0/6 bytes 1000 ttl 0/0/600000")
    assert settings is not None
    none = TierStats(0, 6, 0, 0)
    return CacheStats("answers", "lru", settings, none, none, none, hits, misses, 5, 700, evictions, 0, 0, 0.0)


def hit_rates(rule: Rule, counters: list[tuple[int, int]], *, step_ms: int = 60_000) -> list[float]:
    samples, found = "", []
    for number, (hits, misses) in enumerate(counters):
        _, measured = judged_cache(rule, cache(hits, misses), samples, 600_000 + number * step_ms)
        assert measured is not None
        samples = measured.samples
        assert len(samples) < 1000
        found.append(measured.value)
    return found


def test_hit_rate_is_that_of_the_window() -> None:
    rule = alert('cache = "answers"\nwhen = "hit_rate < 80%"\nwindow = "5m"')
    counters = [(100 * n, 0) for n in range(10)] + [(900, 100 * n) for n in range(1, 10)]
    rates = hit_rates(rule, counters)
    assert math.isnan(rates[0]), "nothing is known before the second sample"
    assert rates[1:10] == [1.0] * 9
    assert rates[10:15] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_counters_that_begin_again_give_no_value() -> None:
    rule = alert('cache = "answers"\nwhen = "hit_rate < 80%"\nmin_events = 1')
    assert math.isnan(hit_rates(rule, [(100, 0), (200, 0), (5, 5)])[2])
    assert judged_cache(rule, cache(5, 5), "", 60_000)[0] is Verdict.UNDECIDED


def test_samples_of_a_long_gap_are_dropped() -> None:
    rule = alert('cache = "answers"\nwhen = "hit_rate < 80%"\nwindow = "5m"')
    assert math.isnan(hit_rates(rule, [(0, 0), (100, 0)], step_ms=700_000)[1])
    long = alert('cache = "answers"\nwhen = "hit_rate < 80%"\nwindow = "1h"')
    assert hit_rates(long, [(100 * n, 0) for n in range(300)])[-1] == 1.0


def test_other_figures_of_a_cache() -> None:
    for when, found in (("size > 4", Verdict.HOLDS), ("bytes > 1kB", None), ("bytes > 1KB", Verdict.CLEAR)):
        if found is not None:
            assert judged_cache(alert(f'cache = "answers"\nwhen = "{when}"'), cache(1, 1), "", 60_000)[0] is found
    rule = alert('cache = "answers"\nwhen = "evictions > 10"')
    _, first = judged_cache(rule, cache(1, 1, 5), "", 60_000)
    assert first is not None
    assert judged_cache(rule, cache(1, 1, 20), first.samples, 120_000)[0] is Verdict.HOLDS


def test_figures_of_a_pool() -> None:
    healthy, sick = AgentInstance("a", "coder", 3, 4), AgentInstance("b", "coder", 1, 6, is_healthy=False)
    pool = PoolStatus(
        "coder",
        LoadBalancingStrategy.LEAST_LOADED,
        (InstanceStatus(healthy, 3, 0, 0, 0, 1), InstanceStatus(sick, 1, 0, 0, 0, 1)),
        waiting=7,
        granted=4,
        overdue=2,
    )
    for when in ("load >= 4", "load >= 40%", "healthy < 2", "unfit > 0", "waiters > 6", "overdue > 1"):
        assert judged_pool(alert(f'pool = "coder"\nwhen = "{when}"'), pool, 10_000)[0] is Verdict.HOLDS, when
