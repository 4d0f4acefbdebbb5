"""The agents of a namespace, and one agent in depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.command import Flow
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.comparison import Comparison
from agentperf_redis.metrics.model import Execution, PerformanceMetrics, StreamMetrics
from agentperf_redis.metrics.series import SeriesRow, series_by_name, series_of
from agentperf_redis.metrics.spans import SpanReport
from agentperf_redis.metrics.workers import RunningExecution, running
from agentperf_redis.views.heatmap import Heatmap, heatmap_of
from agentperf_redis.views.reading import Fault, Parts, flusher_of
from agentperf_redis.views.selection import Order, order_of, selected
from agentperf_redis.views.timeline import CHART_STEPS, DEFAULT_WINDOW, SPARKLINE_STEPS, check_window, steps_read
from agentperf_redis.windows import Interval, Timestamp

MAX_EXECUTIONS = 20
"""Number of slowest and of latest executions in the view of one agent."""


class AgentSort(Enum):
    """The columns by which agents are sorted."""

    NAME = "name"
    TASKS = "tasks"
    RATE = "rate"
    ERRORS = "errors"
    FAILURE_RATE = "failure_rate"
    AVERAGE = "average"
    P50 = "p50"
    P95 = "p95"
    P99 = "p99"
    TOKENS = "tokens"
    COST = "cost"
    LAST_SEEN = "last_seen"


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent in a window.

    Attributes:
        metrics: its metrics, as `MetricsCollector.snapshots` returns them.
        seen: when it last recorded anything, s since 1970, by the server's clock.
        sparkline: executions by step, oldest first; empty if they were not read.
    """

    metrics: PerformanceMetrics
    seen: float | None = None
    sparkline: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The agent."""
        return self.metrics.agent_name

    @property
    def age(self) -> float | None:
        """Seconds from its last record to the end of the window; None if it has no record."""
        return None if self.seen is None else max(0.0, self.metrics.interval.end - self.seen)

    @property
    def tasks(self) -> int:
        """Executions in the window."""
        return self.metrics.task_count

    @property
    def rate(self) -> float:
        """Executions per second."""
        return self.metrics.throughput

    @property
    def errors(self) -> int:
        """Executions that failed."""
        return self.metrics.failure_count

    @property
    def failure_rate(self) -> float | None:
        """Share of executions that failed, 0 to 1. Like the durations below, it is None without executions."""
        return self.metrics.failure_rate if self.tasks else None

    @property
    def avg(self) -> float | None:
        """Average duration, s."""
        return self.metrics.avg_execution_time if self.tasks else None

    @property
    def p50(self) -> float | None:
        """50th percentile of the durations, s."""
        return self.metrics.p50_execution_time if self.tasks else None

    @property
    def p95(self) -> float | None:
        """95th percentile of the durations, s."""
        return self.metrics.p95_execution_time if self.tasks else None

    @property
    def p99(self) -> float | None:
        """99th percentile of the durations, s."""
        return self.metrics.p99_execution_time if self.tasks else None

    @property
    def exact(self) -> bool:
        """Whether the percentiles are exact; otherwise they are within 2.17 %."""
        return self.metrics.exact

    @property
    def tokens(self) -> int:
        """Tokens sent to and received from models."""
        return self.metrics.tokens_in + self.metrics.tokens_out

    @property
    def cost(self) -> float:
        """Cost of the models."""
        return self.metrics.cost

    @property
    def top_error(self) -> tuple[str, int] | None:
        """The most frequent error type and its count; None without errors."""
        return max(self.metrics.error_types.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True, slots=True)
class AllAgents:
    """All agents of a namespace in a window. `listed` makes views of them with any order, filter and page.

    Attributes:
        window: the requested window.
        as_of: its end, s since 1970; None for now.
        total: metrics of all agents together.
        rows: the agents, without sparklines.
        faults: parts that could not be read.
    """

    window: str | float
    as_of: float | None
    total: PerformanceMetrics
    rows: tuple[AgentRow, ...]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Sparklines:
    """The number of executions of each agent, step by step.

    Attributes:
        lines: for each agent, the number of executions in each step, oldest first.
        faults: the reason, if the executions could not be read.
    """

    lines: Mapping[str, tuple[int, ...]]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentsView:
    """The agents of a namespace.

    Attributes:
        window: the requested window.
        as_of: its end, s since 1970; None for now.
        interval: the covered time range.
        total: metrics of all agents together, including those that the filter leaves out.
        rows: the agents of this page, filtered and sorted.
        matching: number of agents that match the filter.
        known: number of all agents.
        order: the order of the rows.
        match: the filter.
        faults: parts that could not be read.
    """

    window: str | float
    as_of: float | None
    interval: Interval
    total: PerformanceMetrics
    rows: tuple[AgentRow, ...]
    matching: int
    known: int
    order: Order[AgentSort]
    match: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent in depth. An unknown agent has counts of zero, and `known` is False.

    Attributes:
        name: the agent.
        known: whether the agent has any record, or an execution that is running.
        window: the requested window.
        as_of: its end, s since 1970; None for now.
        metrics: its metrics in the window.
        seen: when it last recorded anything, s since 1970.
        before: comparison with the time before the window, as `MetricsCollector.compare` returns it.
        steps: the window step by step, oldest first; ``error_types`` of a step counts errors by type.
        error_types: all error types of the steps, the most frequent first.
        heatmap: for each step, the number of executions in each range of durations.
        spans: time by stage.
        streams: timing of its streams.
        slowest: the slowest executions of the last 8 days.
        recent: the latest executions.
        running: executions that have begun and not ended, the oldest first.
        faults: parts that could not be read.
    """

    name: str
    known: bool
    window: str | float
    as_of: float | None
    metrics: PerformanceMetrics
    seen: float | None
    before: Comparison | None
    steps: tuple[SeriesRow, ...]
    error_types: tuple[str, ...]
    heatmap: Heatmap
    spans: SpanReport
    streams: StreamMetrics
    slowest: tuple[Execution, ...]
    recent: tuple[Execution, ...]
    running: tuple[RunningExecution, ...]
    faults: tuple[Fault, ...]


_VALUES: Mapping[AgentSort, Callable[[AgentRow], Any]] = {
    AgentSort.NAME: lambda row: row.name,
    AgentSort.TASKS: lambda row: row.tasks,
    AgentSort.RATE: lambda row: row.rate,
    AgentSort.ERRORS: lambda row: row.errors,
    AgentSort.FAILURE_RATE: lambda row: row.failure_rate,
    AgentSort.AVERAGE: lambda row: row.avg,
    AgentSort.P50: lambda row: row.p50,
    AgentSort.P95: lambda row: row.p95,
    AgentSort.P99: lambda row: row.p99,
    AgentSort.TOKENS: lambda row: row.tokens,
    AgentSort.COST: lambda row: row.cost,
    AgentSort.LAST_SEEN: lambda row: row.seen,
}


def seconds_of(as_of: Timestamp) -> float | None:
    """Return a timestamp as seconds since 1970; None for now."""
    return as_of.timestamp() if isinstance(as_of, datetime) else as_of


def agents(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: AgentSort | str = AgentSort.TASKS,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
    sparklines: bool = True,
) -> Flow[AgentsView]:
    """Read the agents. The call itself checks the arguments.

    Args:
        perf: the client.
        window: length of the window, such as ``"10m"``.
        as_of: end of the window; None for now.
        sort: the column by which rows are sorted.
        descending: the direction; None sorts names upwards and numbers downwards.
        match: part of a name, or a glob; empty for all agents.
        limit: maximum number of rows.
        offset: number of rows before the first one.
        sparklines: whether to read the executions of the rows step by step.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    wanted = arguments.flag("sparklines", sparklines)
    check_window(window, as_of)
    rows = {"sort": sort, "descending": descending, "match": match, "limit": limit, "offset": offset}
    check_rows(**rows)
    return _agents(perf, window, as_of, rows, sparklines=wanted)


def _agents(
    perf: AgentPerf, window: str | float, as_of: Timestamp, rows: Mapping[str, Any], *, sparklines: bool
) -> Flow[AgentsView]:
    found = yield from _all_agents(perf, window, as_of)
    view = listed(found, **rows)
    if not (sparklines and view.rows):
        return view
    lines = yield from _sparklines_of(perf, [row.name for row in view.rows], window, as_of)
    return with_sparklines(view, lines)


def _name(row: AgentRow) -> str:
    return row.name


def all_agents(perf: AgentPerf, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None) -> Flow[AllAgents]:
    """Read all agents, without sparklines. The call itself checks the arguments."""
    check_window(window, as_of)
    return _all_agents(perf, window, as_of)


def _all_agents(perf: AgentPerf, window: str | float, as_of: Timestamp) -> Flow[AllAgents]:
    flusher = flusher_of(perf)
    parts = Parts(
        agents=flows.agents_and_total(flusher, window, as_of),
        last_seen=flows.last_seen(flusher),
    )
    yield from parts.read()
    nothing: tuple[dict[str, PerformanceMetrics], PerformanceMetrics] = ({}, PerformanceMetrics("*"))
    by_name, total = parts.get("agents", nothing)
    seen: Mapping[str, float] = parts.get("last_seen", {})
    rows = tuple(AgentRow(metrics, seen.get(name)) for name, metrics in by_name.items())
    return AllAgents(window, seconds_of(as_of), total, rows, parts.faults)


def listed(
    found: AllAgents,
    *,
    sort: AgentSort | str = AgentSort.TASKS,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
) -> AgentsView:
    """Sort, filter and page agents that were already read. The arguments are those of `agents`.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    order = order_of(sort, descending, AgentSort, upward=(AgentSort.NAME,))
    chosen = selected(found.rows, _name, _VALUES, order, match, limit, offset)
    return AgentsView(
        found.window,
        found.as_of,
        found.total.interval,
        found.total,
        chosen.rows,
        chosen.matching,
        chosen.total,
        order,
        match,
        found.faults,
    )


def check_rows(**rows: Any) -> None:
    """Check the arguments of `listed` before anything is read.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    listed(AllAgents(DEFAULT_WINDOW, None, PerformanceMetrics("*"), ()), **rows)


def with_sparklines(view: AgentsView, found: Sparklines) -> AgentsView:
    """Return a view with the sparklines of its rows."""
    rows = tuple(replace(row, sparkline=found.lines.get(row.name, ())) for row in view.rows)
    return replace(view, rows=rows, faults=view.faults + found.faults)


def _sparklines_of(perf: AgentPerf, names: list[str], window: str | float, as_of: Timestamp) -> Flow[Sparklines]:
    charts = Parts(sparklines=_sparklines(perf, names, window, as_of))
    yield from charts.read()
    return Sparklines(charts.get("sparklines", {}), charts.faults)


def _sparklines(
    perf: AgentPerf, names: list[str], window: str | float, as_of: Timestamp
) -> Flow[dict[str, tuple[int, ...]]]:
    def read(step: int) -> Flow[dict[str, tuple[SeriesRow, ...]]]:
        return series_by_name(flusher_of(perf), names, window, step, as_of)

    nothing: dict[str, tuple[SeriesRow, ...]] = {}
    found = yield from steps_read(read, nothing, window, as_of, SPARKLINE_STEPS)
    return {name: tuple(row.tasks for row in rows) for name, rows in found.items()}


def agent(
    perf: AgentPerf, name: str, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> Flow[AgentView]:
    """Read one agent. The call itself checks the arguments.

    Args:
        perf: the client.
        name: the agent.
        window: length of the window.
        as_of: end of the window; None for now.
    """
    arguments.name("name", name)
    check_window(window, as_of)
    return _agent(perf, name, window, as_of)


def _agent(perf: AgentPerf, name: str, window: str | float, as_of: Timestamp) -> Flow[AgentView]:
    flusher = flusher_of(perf)

    def steps(step: int) -> Flow[tuple[SeriesRow, ...]]:
        return series_of(flusher, name, window, step, as_of)

    parts = Parts(
        comparison=flows.compare(flusher, (name, window, as_of), (None, None, None)),
        last_seen=flows.last_seen(flusher, name),
        steps=steps_read(steps, (), window, as_of, CHART_STEPS),
        spans=flows.spans(flusher, name, window, as_of),
        streams=flows.streams(flusher, name, window, as_of),
        slowest=flows.slowest(flusher, name, MAX_EXECUTIONS),
        recent=flows.recent(flusher, name, MAX_EXECUTIONS),
        running=running(flusher, name),
    )
    yield from parts.read()
    empty = PerformanceMetrics(name)
    rows: tuple[SeriesRow, ...] = parts.get("steps", ())
    seen: Mapping[str, float] = parts.get("last_seen", {})
    comparison: Comparison | None = parts.get("comparison", None)
    metrics = comparison.second if comparison is not None else empty
    executions: tuple[RunningExecution, ...] = parts.get("running", ())
    return AgentView(
        name=name,
        known=name in seen or metrics.task_count > 0 or bool(executions),
        window=window,
        as_of=seconds_of(as_of),
        metrics=metrics,
        seen=seen.get(name),
        before=comparison,
        steps=rows,
        error_types=_types(rows),
        heatmap=heatmap_of(rows),
        spans=parts.get("spans", SpanReport(name, 0.0, ())),
        streams=parts.get("streams", StreamMetrics(0, empty, empty)),
        slowest=parts.get("slowest", ()),
        recent=parts.get("recent", ()),
        running=executions,
        faults=parts.faults,
    )


def _types(rows: tuple[SeriesRow, ...]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for row in rows:
        for error, count in row.error_types.items():
            counts[error] = counts.get(error, 0) + count
    return tuple(sorted(counts, key=lambda error: (-counts[error], error)))


async def read_agents(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: AgentSort | str = AgentSort.TASKS,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
    sparklines: bool = True,
) -> AgentsView:
    """See `agents`."""
    return await perf.backend.arun(
        agents(
            perf,
            window,
            as_of=as_of,
            sort=sort,
            descending=descending,
            match=match,
            limit=limit,
            offset=offset,
            sparklines=sparklines,
        )
    )


async def read_all_agents(
    perf: AgentPerf, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> AllAgents:
    """See `all_agents`."""
    return await perf.backend.arun(all_agents(perf, window, as_of=as_of))


async def read_sparklines(
    perf: AgentPerf, names: list[str], window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> Sparklines:
    """Read the executions of some agents step by step."""
    check_window(window, as_of)
    return await perf.backend.arun(_sparklines_of(perf, names, window, as_of))


async def read_agent(
    perf: AgentPerf, name: str, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> AgentView:
    """See `agent`."""
    return await perf.backend.arun(agent(perf, name, window, as_of=as_of))
