"""One row for each agent: the table and the JSON that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.table import Table

from agentperf_redis.cli.console import new_table, seconds_cell
from agentperf_redis.cli.times import age_text
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.views.problems import BAD_FAILURE_RATE


def agents_table(agents: Iterable[PerformanceMetrics], *, rates: bool = False, past: bool = False) -> Table:
    """Return one row per agent; ≈ marks estimated percentiles.

    Args:
        agents: the agents, in the order of the rows.
        rates: whether to show the executions per second, averaged over the covered time range.
        past: whether the range ended in the past, so that the last execution is shown as a time, not as an age.
    """
    per_second = ["per s"] if rates else []
    table = new_table(
        "agents",
        ["agent"],
        ["tasks", *per_second, "success", "avg s", "p50 s", "p95 s", "p99 s"],
        ["last seen", "top error"],
    )
    for each in agents:
        about = "" if each.exact else "≈"
        errors = sorted(each.error_types.items(), key=lambda item: -item[1])
        table.add_row(
            each.agent_name,
            str(each.task_count),
            *([f"{each.throughput:.3g}"] if rates else []),
            f"{each.success_rate:.1%}",
            seconds_cell(each.avg_execution_time),
            *(f"{about}{seconds_cell(value)}" for value in (each.p50_execution_time, each.p95_execution_time)),
            f"{about}{seconds_cell(each.p99_execution_time)}",
            last_seen_cell(each, past=past),
            f"{errors[0][0]} × {errors[0][1]}" if errors else "",
            style=_style(each),
        )
    return table


def by_tasks(agents: Iterable[PerformanceMetrics]) -> list[PerformanceMetrics]:
    """Sort agents by their number of executions, the largest first."""
    return sorted(agents, key=lambda agent: -agent.task_count)


def by_failures(agents: Iterable[PerformanceMetrics]) -> list[PerformanceMetrics]:
    """Sort agents by their failure rate, the largest first. Agents of the same rate are sorted by executions."""
    return sorted(agents, key=lambda agent: (-agent.failure_rate, -agent.task_count))


def last_seen_cell(agent: PerformanceMetrics, *, past: bool = False) -> str:
    """Return the time since the last execution, by the server's clock; with `past`, the time of that execution."""
    last = agent.last_execution
    if last is None:
        return ""
    return f"{last:%Y-%m-%d %H:%M:%S}" if past else age_text(agent.interval.end - last.timestamp())


def _style(agent: PerformanceMetrics) -> str | None:
    if not agent.failure_count:
        return None
    return "red" if agent.failure_rate >= BAD_FAILURE_RATE else "yellow"


def plain_agent(agent: PerformanceMetrics) -> dict[str, Any]:
    """Return the fields that every --json output has for an agent."""
    return {
        "agent": agent.agent_name,
        "tasks": agent.task_count,
        "success_rate": agent.success_rate,
        "avg_s": agent.avg_execution_time,
        "p50_s": agent.p50_execution_time,
        "p95_s": agent.p95_execution_time,
        "p99_s": agent.p99_execution_time,
        "percentiles_exact": agent.exact,
        "throughput_per_s": agent.throughput,
        "last_seen": plain_time(agent.last_execution),
        "errors": dict(agent.error_types),
    }


def plain_time(time: datetime | None) -> str | None:
    """Return a local time for JSON, with its zone."""
    return None if time is None else time.astimezone().isoformat()
