"""The pages about agents: a list of all agents, and a page with the details of one agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from markupsafe import Markup

from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.views.agents import AgentRow, AgentView
from agentperf_redis.views.heatmap import Heatmap
from agentperf_redis.web.charts.columns import Band, column_chart
from agentperf_redis.web.charts.heat_map import heat_map
from agentperf_redis.web.charts.lines import Line, line_chart
from agentperf_redis.web.charts.small import meter, sparkline
from agentperf_redis.web.pages.asked import PAGE_ROWS, Asked
from agentperf_redis.web.pages.rendering import Page
from agentperf_redis.web.pages.text import cost, duration, number, rate, share, times, visible

_STYLES: Final = ("s2", "s4", "s5", "s3")
"""Styles of the error types with their own band. All others share one band, so that bands stay distinguishable."""


async def agents(views: Any, asked: Asked) -> Page:
    """All agents."""
    view = await views.agents(asked.window, **asked.rows)
    first = asked.page * PAGE_ROWS
    sparklines = {row.name: _tasks_line(row) for row in view.rows}
    values = {
        "view": view,
        "order": view.order,
        "match": view.match,
        "first": first,
        "page": asked.page,
        "sparklines": sparklines,
    }
    return Page("agents.html", "Agents", values)


def _tasks_line(row: AgentRow) -> Markup:
    whole = row.sparkline[:-1] or row.sparkline  # the last step is not complete yet, so it would look like a decline
    if not whole:
        return Markup("")
    return sparkline(whole, f"Executions over time, at most {number(max(whole))} in a step")


async def agent(views: Any, asked: Asked) -> Page:
    """Show one agent. An agent without records has a page too, because an old link may lead to it."""
    name = asked.text("name")
    view = await views.agent(name, asked.window)
    values = {
        "view": view,
        "percentiles": percentiles_chart(view.steps),
        "percentile_rows": [
            (step.interval.end, [number(step.tasks), *(_duration(step, each) for each in ("p50", "p95", "p99"))])
            for step in reversed(view.steps)
        ],
        "executions": outcomes_chart(view.steps),
        "errors": errors_chart(view.steps, view.error_types),
        "outcome_head": ["Executions", "Errors", "Cancelled", "Tokens", "Cost"],
        "outcome_rows": [
            (
                step.interval.end,
                [number(step.tasks), number(step.errors), number(step.cancelled), number(step.tokens), cost(step.cost)],
            )
            for step in reversed(view.steps)
        ],
        "heat": heat_chart(view.heatmap),
        "throughput": rate_line(view.steps),
        "changes": changes(view),
        "spans": [(span, meter(span.share, 1.0, f"{share(span.share)} of the time")) for span in view.spans.tree],
        "error_types": sorted(view.metrics.error_types.items(), key=lambda item: (-item[1], item[0])),
    }
    return Page("agent.html", name, values)


def _duration(step: SeriesRow, figure: str) -> str:
    return duration(getattr(step, figure)) if step.tasks else duration(None)


def percentiles_chart(steps: Sequence[SeriesRow]) -> Markup:
    """Return the chart of p50, p95 and p99 over time."""
    lines = [
        Line(figure, [getattr(step, figure) if step.tasks else None for step in steps], style)
        for figure, style in (("p95", "s1"), ("p99", "s2"), ("p50", "s3"))
    ]
    label = (
        "Line chart of the 50th, 95th and 99th percentile of the durations over time; the table below has its numbers"
    )
    return line_chart([step.interval for step in steps], lines, duration, label)


def outcomes_chart(steps: Sequence[SeriesRow]) -> Markup:
    """Return the chart of executions by outcome."""
    bands = [
        Band("succeeded", [step.tasks - step.errors - step.cancelled for step in steps], "s1"),
        Band("failed", [step.errors for step in steps], "s2"),
    ]
    if any(step.cancelled for step in steps):
        bands.append(Band("cancelled", [step.cancelled for step in steps], "s6"))
    return column_chart(
        [step.interval for step in steps], bands, number, "Column chart of executions over time, by outcome"
    )


def errors_chart(steps: Sequence[SeriesRow], error_types: Sequence[str]) -> Markup:
    """Return the chart of failures by type."""
    named = list(error_types[: len(_STYLES)])
    bands = [
        Band(visible(each), [step.error_types.get(each, 0) for step in steps], style)
        for each, style in zip(named, _STYLES, strict=False)
    ]
    rest = [max(0, step.errors - sum(step.error_types.get(each, 0) for each in named)) for step in steps]
    if any(rest):
        bands.append(Band("others", rest, "s6"))
    return column_chart([step.interval for step in steps], bands, number, "Column chart of errors over time, by type")


def heat_chart(found: Heatmap) -> Markup:
    """Return the heat map of the durations."""
    rows = [f"≤ {duration(band.high)}" for band in found.bands]
    counts = {
        (column, row): count
        for row, band in enumerate(found.bands)
        for column, count in enumerate(band.counts)
        if count
    }
    label = "Heat map of the durations: one column a step, one row a range of durations, darker for more executions"
    return heat_map(found.steps, rows, counts, label)


def rate_line(steps: Sequence[SeriesRow]) -> Markup:
    """Return a sparkline of the throughput."""
    rates = [step.throughput for step in steps]
    return sparkline(rates, f"Throughput over time, at most {rate(max(rates, default=0.0))}")


def changes(view: AgentView) -> list[dict[str, str]]:
    """Compare the window with the time before it. A difference within the error of the percentiles does not count."""
    comparison = view.before
    if comparison is None or not (comparison.first.task_count and comparison.second.task_count):
        return []
    found = []
    for title, figure, written in (
        ("p50", "p50_execution_time", duration),
        ("p95", "p95_execution_time", duration),
        ("Average", "avg_execution_time", duration),
        ("Failure rate", "failure_rate", share),
    ):
        change = comparison[figure]
        text, style = "about the same", ""
        if change.certain and change.difference:
            worse = change.difference > 0
            text = f"{'▲' if worse else '▼'} {times(change.ratio)}, {'worse' if worse else 'better'}"
            style = "worse" if worse else "better"
        found.append(
            {
                "title": title,
                "before": written(change.first),
                "now": written(change.second),
                "text": text,
                "style": style,
            }
        )
    return found
