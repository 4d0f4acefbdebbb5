"""The stored counters of a series. They can be added up and converted to `PerformanceMetrics`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis.metrics.histogram import RELATIVE_ERROR, estimated_quantiles, exact_quantile, merged
from agentperf_redis.metrics.model import Interval, ModelUsage, PerformanceMetrics, seconds
from agentperf_redis.windows import local_timestamp


@dataclass(frozen=True, slots=True)
class Counters:
    """The stored counters of one series, as whole numbers: durations in us, times in ms, costs in billionths."""

    counts: Mapping[str, int]
    errors: Mapping[str, int]
    buckets: Mapping[int, int]
    models: Mapping[str, Mapping[str, int]]
    durations_us: tuple[int, ...]
    interval_ms: tuple[int, int]

    @property
    def n(self) -> int:
        """Number of executions."""
        return self.counts.get("n", 0)


MINIMA = frozenset({"min_us", "first_ms"})
MAXIMA = frozenset({"max_us", "last_ms"})


def added(counter_sets: Iterable[Counters]) -> Counters:
    """Combine the counters of series or windows: add the sums, keep the smallest minimum and the largest maximum."""
    parts = list(counter_sets)
    if len(parts) == 1:
        return parts[0]
    counts: dict[str, int] = {}
    errors: dict[str, int] = {}
    models: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, value in part.counts.items():
            if name not in counts:
                counts[name] = value
            elif name in MINIMA:
                counts[name] = min(counts[name], value)
            elif name in MAXIMA:
                counts[name] = max(counts[name], value)
            else:
                counts[name] += value
        for name, value in part.errors.items():
            errors[name] = errors.get(name, 0) + value
        for name, measures in part.models.items():
            model = models.setdefault(name, {})
            for measure, value in measures.items():
                model[measure] = model.get(measure, 0) + value
    durations = [us for part in parts for us in part.durations_us]
    return Counters(
        counts=counts,
        errors=errors,
        buckets=merged(part.buckets for part in parts),
        models=models,
        durations_us=tuple(durations) if len(durations) == counts.get("n", 0) else (),
        interval_ms=(min(part.interval_ms[0] for part in parts), max(part.interval_ms[1] for part in parts)),
    )


SHARES = (0.5, 0.95, 0.99)
"""The percentiles of a snapshot."""
_NOT_READ = (float("nan"),) * len(SHARES)


def performance(agent_name: str, counters: Counters, *, plain: bool = False) -> PerformanceMetrics:
    """Make the snapshot of an agent from its counters. With `plain`, there are no buckets, and percentiles are NaN."""
    counts = counters.counts
    get = counts.get
    n = get("n", 0)
    total_s = seconds(get("sum_us", 0))
    minimum = seconds(counts["min_us"]) if "min_us" in counts else float("inf")
    maximum = seconds(get("max_us", 0))
    zeros = get("h:zero", 0)
    times = tuple(map(seconds, counters.durations_us))
    exact = len(times) == n
    if plain and n:
        p50, p95, p99 = _NOT_READ
    elif times:
        ordered = sorted(times)
        p50, p95, p99 = (exact_quantile(ordered, share) for share in SHARES)
    else:
        p50, p95, p99 = estimated_quantiles(counters.buckets, zeros, SHARES, minimum=minimum, maximum=maximum)
    return PerformanceMetrics(
        agent_name=agent_name,
        task_count=n,
        success_count=get("ok", 0),
        failure_count=get("err", 0),
        total_execution_time=total_s,
        min_execution_time=minimum,
        max_execution_time=maximum,
        avg_execution_time=total_s / n if n else 0.0,
        p50_execution_time=p50,
        p95_execution_time=p95,
        p99_execution_time=p99,
        execution_times=times,
        error_types=counters.errors,
        last_execution=local_timestamp(counts["last_ms"]) if n and "last_ms" in counts else None,
        cancelled_count=get("cancelled", 0),
        exact=exact,
        error_bound=0.0 if exact else RELATIVE_ERROR,
        buckets=counters.buckets,
        zeros=zeros,
        tokens_in=get("tok_in", 0),
        tokens_out=get("tok_out", 0),
        cost=get("cost_nano", 0) / 1e9,
        llm_calls=get("llm_calls", 0),
        tool_calls=get("tool_calls", 0),
        models={name: _usage(measures) for name, measures in counters.models.items()} if counters.models else {},
        interval=_interval(*counters.interval_ms),
        tokens_cached_in=get("tok_cached_in", 0),
        tokens_cache_write=get("tok_cache_write", 0),
        tokens_reasoning=get("tok_reasoning", 0),
    )


@lru_cache(maxsize=64)
def _interval(start_ms: int, end_ms: int) -> Interval:
    """Return the interval. It is cached, because all agents of a read have the same one."""
    return Interval(start_ms / 1000, end_ms / 1000)


def _usage(measures: Mapping[str, int]) -> ModelUsage:
    return ModelUsage(
        calls=measures.get("n", 0),
        tokens_in=measures.get("tok_in", 0),
        tokens_out=measures.get("tok_out", 0),
        cost=measures.get("cost_nano", 0) / 1e9,
        tokens_cached_in=measures.get("tok_cached_in", 0),
        tokens_cache_write=measures.get("tok_cache_write", 0),
        tokens_reasoning=measures.get("tok_reasoning", 0),
    )
