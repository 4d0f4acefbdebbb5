"""The lines of `agentperf top` without a terminal."""

from __future__ import annotations

from agentperf_redis.metrics.model import Interval, PerformanceMetrics
from agentperf_redis.top import lines
from agentperf_redis.views.overview import NO_CHANGES, Overview


def reading(total: PerformanceMetrics) -> Overview:
    return Overview("here", "n", "5m", None, total, (), 0, (), (), (), (), (), NO_CHANGES, (), (), ())


def test_columns_stand_below_their_titles() -> None:
    total = PerformanceMetrics(
        "*",
        task_count=12_345,
        failure_count=1234,
        p95_execution_time=12.5,
        exact=False,
        cost=123.456,
        interval=Interval(0.0, 300.0),
    )
    head, line = lines.head(), lines.line(reading(total))
    assert len(head) == len(line) == 80
    assert line.split()[1:6] == ["12.3k", "41.1", "10.0%", "≈12.500", "123.5"]


def test_empty_namespace_has_a_line() -> None:
    empty = reading(PerformanceMetrics("*"))
    assert len(lines.line(empty)) == len(lines.head())
    assert lines.plain(empty)["hit_rate"] is None


def test_narrow_terminal_has_fewer_columns() -> None:
    empty = reading(PerformanceMetrics("*"))
    for width in (80, 70, 60, 52):
        assert len(lines.head(width)) == len(lines.line(empty, width)) <= width
    assert "workers" not in lines.head(79)
    assert lines.head(10_000) == lines.head(80)
    assert lines.head(20).split() == ["time", "tasks", "per", "s", "failed", "p95", "s", "load", "firing"]
