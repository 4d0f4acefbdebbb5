"""The values that rules judge: agents are judged on their counters, caches and pools on their statistics.

Percentiles come from the histogram even where the server holds all raw durations. A replay of the past has only
histograms, and it must come to the same verdicts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from agentperf_redis.alerts.evaluation import BurnCounts, Verdict, burn_verdict, verdict
from agentperf_redis.alerts.expression import Condition, share_of
from agentperf_redis.alerts.model import Measured
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.metrics.histogram import bucket_bounds, middle, rank
from agentperf_redis.metrics.model import Interval, PerformanceMetrics

Judged = tuple[Verdict, Measured | None]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the executions of an agent in a window.

    Attributes:
        tasks: number of executions.
        errors: number of failed executions.
        cancelled: number of cancelled executions.
        sum_us: sum of the durations, us.
        max_s: longest duration, s.
        tokens: tokens in and out.
        cost: cost of the models.
        buckets: the histogram.
        zeros: number of durations of 0 us.
        interval: the covered time range.
    """

    tasks: int
    errors: int
    cancelled: int
    sum_us: int
    max_s: float
    tokens: int
    cost: float
    buckets: Mapping[int, int]
    zeros: int
    interval: Interval


def totals_of(metrics: PerformanceMetrics) -> Totals:
    """Return the totals of a snapshot."""
    return Totals(
        tasks=metrics.task_count,
        errors=metrics.failure_count,
        cancelled=metrics.cancelled_count,
        sum_us=round(metrics.total_execution_time * 1e6),
        max_s=metrics.max_execution_time,
        tokens=metrics.tokens_in + metrics.tokens_out,
        cost=metrics.cost,
        buckets=metrics.buckets,
        zeros=metrics.zeros,
        interval=metrics.interval,
    )


_VALUES: Mapping[str, Callable[[Totals], float]] = {
    "avg": lambda of: of.sum_us / of.tasks / 1e6 if of.tasks else 0.0,
    "max": lambda of: of.max_s,
    "failure_rate": lambda of: of.errors / of.tasks if of.tasks else 0.0,
    "success_rate": lambda of: (of.tasks - of.errors - of.cancelled) / of.tasks if of.tasks else 0.0,
    "tasks": lambda of: of.tasks,
    "errors": lambda of: of.errors,
    "throughput": lambda of: of.tasks / of.interval.seconds if of.interval.seconds > 0 else 0.0,
    "tokens": lambda of: of.tokens,
    "cost": lambda of: of.cost,
}


def measured_agent(measure: str, of: Totals) -> Measured:
    """Return the value of a measure of an agent."""
    share = share_of(measure)
    if not share:
        value = float(_VALUES[measure](of))
        return Measured(value, value, value, of.tasks, of.interval)
    indexes = sorted(of.buckets)
    passed = list(accumulate((of.buckets[index] for index in indexes), initial=of.zeros))
    if passed[-1] == 0:
        return Measured(0.0, 0.0, 0.0, 0, of.interval)
    at = bisect_right(passed, rank(passed[-1], share))
    return Measured(*bucket_value(indexes[at - 1] if at else None), of.tasks, of.interval)


_HALF_MICROSECOND = 5e-7


def bucket_value(index: int | None) -> tuple[float, float, float]:
    """Return three values of a duration in a bucket, s: the estimate, the smallest and the largest possible value.

    Args:
        index: the bucket; None for durations of 0 us.
    """
    if index is None:
        return 0.0, 0.0, _HALF_MICROSECOND
    low, high = bucket_bounds(index)
    return middle(index), math.nextafter(low, math.inf), high


def burn_counts(rule: Rule, of: Totals) -> BurnCounts:
    """Count the executions that are bad by the objective of a rule."""
    assert rule.objective is not None  # noqa: S101  the caller passes burn-rate rules only
    under = rule.objective.under_s
    if under is None:
        return BurnCounts(of.tasks, of.errors, of.errors)
    least = most = 0
    for index, count in of.buckets.items():
        low, high = bucket_bounds(index)
        if low >= under:
            least += count
        if high > under:
            most += count
    return BurnCounts(of.tasks, least, most)


def judged_agent(rule: Rule, by_window: Mapping[float, Totals]) -> Judged:
    """Judge an agent by a rule.

    Args:
        rule: the rule.
        by_window: the totals of each window that the rule reads, by its length, s.
    """
    if rule.objective is None:
        assert rule.when is not None  # noqa: S101  a rule without an objective has a condition
        measured = measured_agent(rule.when.measure, by_window[rule.window])
        return verdict(rule, measured), measured
    found, value, low, high = burn_verdict(rule, {window: burn_counts(rule, of) for window, of in by_window.items()})
    longest = by_window[rule.window]
    return found, None if math.isnan(value) else Measured(value, low, high, longest.tasks, longest.interval)


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """The figures of a pool that rules judge; see `PoolStatus` for those of a live pool."""

    load: int
    capacity: int
    healthy: int
    unhealthy: int
    waiters: int
    overdue: int

    @staticmethod
    def of(pool: PoolStatus) -> PoolFigures:
        """Return the figures of a live pool."""
        unhealthy = len(pool.instances) - pool.healthy
        return PoolFigures(pool.current_load, pool.total_capacity, pool.healthy, unhealthy, pool.waiting, pool.overdue)


def pool_value(condition: Condition, of: PoolFigures) -> float:
    """Return the value that a condition on a pool compares with its threshold."""
    if condition.is_relative and of.capacity:
        return of.load / of.capacity
    return float(getattr(of, condition.measure))


def judged_pool(rule: Rule, pool: PoolStatus, at_ms: int) -> Judged:
    """Judge a pool by a rule."""
    assert rule.when is not None  # noqa: S101  all rules on pools have a condition
    value = pool_value(rule.when, PoolFigures.of(pool))
    measured = Measured(value, value, value, -1, Interval(at_ms / 1000, at_ms / 1000))
    return verdict(rule, measured), measured


@dataclass(frozen=True, slots=True)
class _Sample:
    at_ms: int
    hits: int
    misses: int
    evictions: int


_SAMPLES_PER_WINDOW = 10
"""Number of stored samples of a cache's counters in one window. A window begins at a stored sample. So it may be longer
than the rule says, by a tenth of its length or by one interval of evaluation."""


def judged_cache(rule: Rule, cache: CacheStats, samples: str, at_ms: int) -> Judged:
    """Judge a cache by a rule.

    The counters of a cache count since its first use. So the counts in a window are the differences between the
    counters and an older sample of them, which was stored with the state of the rule. Until there is such a sample,
    rules on counters are undecided.

    Args:
        rule: the rule.
        cache: the statistics.
        samples: the stored samples.
        at_ms: time of the evaluation, ms since 1970.
    """
    assert rule.when is not None  # noqa: S101  all rules on caches have a condition
    now = _Sample(at_ms, cache.hits, cache.misses, cache.evictions)
    window_ms = round(rule.window * 1000)
    known = _continued(_unpacked(samples), now, 2 * window_ms)
    spacing = max(rule.every * 1000, window_ms // _SAMPLES_PER_WINDOW)
    base = known[0] if known else now
    kept = known if known and at_ms - known[-1].at_ms < spacing else (*known, now)
    older = [index for index, each in enumerate(kept) if each.at_ms <= at_ms - window_ms]
    if older:
        base = kept[older[-1]]
        kept = kept[older[-1] :]
    reads = now.hits - base.hits + now.misses - base.misses
    interval = Interval(base.at_ms / 1000, at_ms / 1000)
    unknown = base is now
    value = {
        "hit_rate": (now.hits - base.hits) / reads if reads else 0.0,
        "evictions": float(now.evictions - base.evictions),
        "size": float(cache.size),
        "bytes": float(cache.bytes),
    }[rule.when.measure]
    low, high = value, value
    events = reads if rule.when.measure == "hit_rate" else -1
    if unknown and rule.when.measure in ("hit_rate", "evictions"):
        value, low, high, events = math.nan, -math.inf, math.inf, -1
    measured = Measured(value, low, high, events, interval, _packed(kept))
    return verdict(rule, measured), measured


def _continued(known: tuple[_Sample, ...], now: _Sample, longest_ms: int) -> tuple[_Sample, ...]:
    """Return the samples that are at most `longest_ms` old; none if the counters have started again from 0."""
    last = known[-1] if known else now
    if now.hits < last.hits or now.misses < last.misses or now.evictions < last.evictions:
        return ()
    return tuple(each for each in known if now.at_ms - longest_ms <= each.at_ms < now.at_ms)


def _packed(samples: tuple[_Sample, ...]) -> str:
    return ",".join(f"{each.at_ms}:{each.hits}:{each.misses}:{each.evictions}" for each in samples)


def _unpacked(text: str) -> tuple[_Sample, ...]:
    parts = (part.split(":") for part in text.split(",") if part)
    numbers = [[int(number) for number in part if number] for part in parts]
    return tuple(_Sample(*each) for each in numbers if len(each) == 4)  # noqa: PLR2004  a sample has four fields
