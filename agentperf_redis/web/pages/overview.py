"""The first page. It shows whether all is well, and if not, where and since when it is not."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.views.overview import Move, Overview
from agentperf_redis.web.charts.lines import Line, line_chart
from agentperf_redis.web.charts.small import sparkline
from agentperf_redis.web.pages.agents import outcomes_chart
from agentperf_redis.web.pages.asked import Asked
from agentperf_redis.web.pages.rendering import Page
from agentperf_redis.web.pages.text import cost, duration, number, plural, rate, share, times

MAX_ROWS = 8
"""Rows of each short list. The pages in the menu show all rows."""
SHOWN_PROBLEMS, MAX_PROBLEMS = 4, 50
"""Number of problems shown at first, so that the charts stay in view, and maximum number of problems in the list."""


async def overview(views: Any, asked: Asked) -> Page:
    """Everything at a glance."""
    view = await views.overview(asked.window)
    values = {
        "view": view,
        "tiles": tiles(view),
        "outcomes": outcomes_chart(view.steps),
        "outcome_rows": [
            (step.interval.end, [number(step.tasks), number(step.errors), number(step.cancelled)])
            for step in reversed(view.steps)
        ],
        "percentiles": _percentiles(view),
        "percentile_rows": [
            (step.interval.end, [duration(each) if step.tasks else duration(None) for each in (step.p50, step.p95)])
            for step in reversed(view.steps)
        ],
        "moves": [_move(each) for each in view.changes.moves],
        "since": {(alert.rule, alert.target): alert.since for alert in view.firing},
        "most": MAX_ROWS,
        "shown": SHOWN_PROBLEMS,
        "most_problems": MAX_PROBLEMS,
    }
    return Page("empty.html" if view.empty and not view.faults else "overview.html", "Overview", values)


def tiles(view: Overview) -> list[tuple[str, str, str, Markup]]:
    """Return the most important figures: name, value, note, sparkline."""
    total, steps = view.total, view.steps
    ran = total.task_count > 0
    approximate = "" if total.exact or not ran else f"within {total.error_bound:.1%}"
    lost = len(view.workers) - view.workers_alive

    def line(label: str, values: list[float | None], style: str = "s1") -> Markup:
        return sparkline(values, f"{label} over time", style=style) if steps else Markup("")

    return [
        (
            "Throughput",
            rate(total.throughput),
            plural(total.task_count, "execution"),
            line("Throughput", [s.throughput for s in steps]),
        ),
        (
            "Success",
            share(total.success_rate if ran else None),
            plural(total.failure_count, "error"),
            line("Share of successes", [1 - s.failure_rate if s.tasks else None for s in steps]),
        ),
        (
            "p95",
            duration(total.p95_execution_time if ran else None),
            approximate or "of all executions",
            line("95th percentile of the durations", [s.p95 if s.tasks else None for s in steps]),
        ),
        (
            "Tokens",
            number(total.tokens_in + total.tokens_out),
            f"{number(total.tokens_in)} in, {number(total.tokens_out)} out",
            line("Tokens per second", [_per_second(s, s.tokens) for s in steps]),
        ),
        (
            "Cost",
            cost(total.cost),
            plural(total.llm_calls, "model call"),
            line("Cost per second", [_per_second(s, s.cost) for s in steps]),
        ),
        (
            "Workers",
            number(view.workers_alive),
            f"alive, {lost} lost" if lost else f"alive, {plural(len(view.running), 'long execution')}",
            Markup(""),
        ),
    ]


def _per_second(step: SeriesRow, amount: float) -> float:
    """Return an amount as a rate: the last step is still short, so its amount alone would look like a decline."""
    return amount / step.interval.seconds if step.interval.seconds else 0.0


def _percentiles(view: Overview) -> Markup:
    lines = [
        Line("p95", [step.p95 if step.tasks else None for step in view.steps], "s1"),
        Line("p50", [step.p50 if step.tasks else None for step in view.steps], "s3"),
    ]
    label = "Line chart of the 50th and 95th percentile of the durations of all executions over time"
    return line_chart([step.interval for step in view.steps], lines, duration, label)


def _move(move: Move) -> dict[str, Any]:
    written = share if move.figure == "failure rate" else duration
    change = move.change
    return {
        "agent": move.agent,
        "figure": move.figure,
        "before": written(change.first),
        "now": written(change.second),
        "worse": move.worse,
        "times": times(change.ratio),
    }
