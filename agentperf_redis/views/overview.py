"""A namespace at a glance: throughput, errors, cost, workers, problems, and what changed in the last hour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts import flows as alert_flows
from agentperf_redis.alerts.model import AlertState, AlertStatus
from agentperf_redis.alerts.model import Overview as AlertOverview
from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.cache.flows.inspection import read_all_stats
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.command import Flow
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.comparison import Change, compared
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.metrics.series import SeriesRow, merged_rows, series_by_name
from agentperf_redis.metrics.workers import RunningExecution, WorkerInfo, workers
from agentperf_redis.views.agents import AgentRow, seconds_of
from agentperf_redis.views.alerts import NO_ALERTS, service_of
from agentperf_redis.views.caches import CacheRow
from agentperf_redis.views.pools import PoolRow, operations_of
from agentperf_redis.views.problems import Problem, problems
from agentperf_redis.views.reading import Fault, Parts, flusher_of
from agentperf_redis.views.timeline import DEFAULT_WINDOW, SPARKLINE_STEPS, check_window, steps_read
from agentperf_redis.windows import Interval, Timestamp, asked_time

CHANGES_WINDOW = "1h"
MIN_TASKS = 20
"""Minimum number of executions in each of the two compared hours. Percentiles of fewer executions change by chance."""
MAX_SLICES = 10_000
"""Maximum number of slices that charts read for all agents together. But a chart has at least `MIN_STEPS` steps."""
MIN_STEPS = 6
MAX_MOVES = 10


@dataclass(frozen=True, slots=True)
class Move:
    """A figure of an agent whose change from the hour before to the last hour is certain (`Change.certain`).

    Attributes:
        agent: the agent.
        figure: "p95" or "failure rate".
        change: the figure in both hours, as `MetricsCollector.compare` returns it; p95 in s, the failure rate as a
            share from 0 to 1.
        worse: whether the figure rose.
    """

    agent: str
    figure: str
    change: Change
    worse: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed in the last hour. Without executions in the hour before, it is `NO_CHANGES`, which is empty.

    Attributes:
        moves: the figures that changed most; figures that got worse come first.
        appeared: agents with executions in the last hour and none in the hour before.
        vanished: agents with executions in the hour before and none in the last hour.
        interval: the last hour.
        before: the hour before.
    """

    moves: tuple[Move, ...]
    appeared: tuple[str, ...]
    vanished: tuple[str, ...]
    interval: Interval
    before: Interval


@dataclass(frozen=True, slots=True)
class Overview:
    """A namespace at a glance.

    Attributes:
        server: address of the server, password masked.
        namespace: the namespace.
        window: the requested window.
        as_of: its end, s since 1970; None for now. Caches, pools, workers and alerts are always current.
        total: metrics of all agents together in the window: executions, errors, percentiles, tokens, cost.
        agents: the agents with executions, model calls or tool calls in the window; the agent with the most executions
            comes first.
        idle: number of the other known agents.
        steps: all agents together, step by step, oldest first.
        workers: the workers, lost ones first.
        running: executions that have begun and not ended, the oldest first.
        problems: firing alerts, failing agents, unhealthy instances, waiters, useless caches; problems of level "bad"
            first.
        firing: the firing alerts.
        changes: what changed in the last hour.
        caches: all caches, the most read cache first.
        pools: all pools, the pool with the highest share of its capacity in use first.
        faults: parts that could not be read.
    """

    server: str
    namespace: str
    window: str | float
    as_of: float | None
    total: PerformanceMetrics
    agents: tuple[AgentRow, ...]
    idle: int
    steps: tuple[SeriesRow, ...]
    workers: tuple[WorkerInfo, ...]
    running: tuple[RunningExecution, ...]
    problems: tuple[Problem, ...]
    firing: tuple[AlertStatus, ...]
    changes: Changes
    caches: tuple[CacheRow, ...]
    pools: tuple[PoolRow, ...]
    faults: tuple[Fault, ...]

    @property
    def interval(self) -> Interval:
        """The covered time range."""
        return self.total.interval

    @property
    def workers_alive(self) -> int:
        """Number of workers that are alive."""
        return sum(worker.alive for worker in self.workers)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show: no agent, cache, pool, worker or firing alert."""
        return not (self.agents or self.idle or self.caches or self.pools or self.workers or self.firing)


NO_CHANGES = Changes((), (), (), Interval(0.0, 0.0), Interval(0.0, 0.0))


def changes(perf: AgentPerf, *, as_of: Timestamp = None) -> Flow[Changes]:
    """Compare the hour until `as_of` with the hour before, agent by agent. The call itself checks the argument."""
    asked_time(CHANGES_WINDOW, as_of)
    return _changes(perf, as_of)


def _changes(perf: AgentPerf, as_of: Timestamp) -> Flow[Changes]:
    flusher = flusher_of(perf)
    last = yield from flows.agents(flusher, CHANGES_WINDOW, as_of)
    start = min((each.interval.start for each in last.values() if each.interval.start), default=0.0)
    if not start:
        return NO_CHANGES
    earlier = yield from flows.agents(flusher, CHANGES_WINDOW, start)
    if not any(then.task_count for then in earlier.values()):
        return NO_CHANGES
    moves = [move for name, now in last.items() if name in earlier for move in _moves(earlier[name], now)]
    moves.sort(key=lambda move: (not move.worse, -_size(move.change), move.agent))
    return Changes(
        tuple(moves[:MAX_MOVES]),
        tuple(name for name, now in last.items() if now.task_count and not _tasks(earlier, name)),
        tuple(name for name, then in earlier.items() if then.task_count and not _tasks(last, name)),
        _covered(last),
        _covered(earlier),
    )


def _tasks(agents: Mapping[str, PerformanceMetrics], name: str) -> int:
    return agents[name].task_count if name in agents else 0


def _covered(agents: Mapping[str, PerformanceMetrics]) -> Interval:
    intervals = [each.interval for each in agents.values()]
    return Interval(min(each.start for each in intervals), max(each.end for each in intervals))


_FIGURES = {"p95": "p95_execution_time", "failure rate": "failure_rate"}


def _moves(before: PerformanceMetrics, now: PerformanceMetrics) -> list[Move]:
    if min(before.task_count, now.task_count) < MIN_TASKS:
        return []
    comparison = compared(before, now)
    found = [(figure, comparison[field]) for figure, field in _FIGURES.items()]
    return [
        Move(now.agent_name, figure, change, worse=change.difference > 0)
        for figure, change in found
        if change.certain and _size(change) >= _MIN_SIZE
    ]


_MIN_SIZE = 0.05
"""Smaller moves are left out: changes of less than about 5 % of a percentile, or of 1 + 10 * failure rate."""


def _size(change: Change) -> float:
    """Return how far a figure moved. For a percentile, this is the logarithm of the ratio; rates use a similar scale.

    A failure rate that rises from 0 to 10 % counts as much as a percentile that doubles.
    """
    if change.name == "failure_rate":
        return abs(math.log((1 + 10 * change.second) / (1 + 10 * change.first)))
    return abs(math.log(change.second / change.first)) if change.first > 0 and change.second > 0 else 0.0


def overview(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    known_changes: Changes | None = None,
    charts: bool = True,
) -> Flow[Overview]:
    """Read a namespace at a glance. The call itself checks the arguments.

    Args:
        perf: the client.
        window: length of the window.
        as_of: end of the window; None for now.
        known_changes: the result of an earlier call of `changes`. It hardly changes within a minute, so it need not be
            read each time. None reads it.
        charts: whether to read the steps too. With a thousand agents, the steps take as long as everything else
            together.
    """
    check_window(window, as_of)
    return _overview(perf, window, as_of, known_changes, charts=arguments.flag("charts", charts))


def _overview(
    perf: AgentPerf, window: str | float, as_of: Timestamp, known_changes: Changes | None, *, charts: bool
) -> Flow[Overview]:
    flusher = flusher_of(perf)

    def steps(step: int) -> Flow[dict[str, tuple[SeriesRow, ...]]]:
        return series_by_name(flusher, None, window, step, as_of)

    flows_by_part: dict[str, Flow[Any]] = {
        "agents": flows.agents_and_total(flusher, window, as_of),
        "last_seen": flows.last_seen(flusher),
        "workers": workers(flusher),
        "caches": read_all_stats(perf.backend),
        "pools": operations_of(perf).status(()),
        "alerts": alert_flows.overview(service_of(perf)),
    }
    if known_changes is None:
        flows_by_part["changes"] = changes(perf, as_of=as_of)
    parts = Parts(**flows_by_part)
    yield from parts.read()
    nothing: tuple[dict[str, PerformanceMetrics], PerformanceMetrics] = ({}, PerformanceMetrics("*"))
    by_name, total = parts.get("agents", nothing)
    faults = parts.faults
    history: Mapping[str, tuple[SeriesRow, ...]] = {}
    if charts:
        chart = Parts(history=steps_read(steps, {}, window, as_of, max_steps(len(by_name))))
        yield from chart.read()
        history = chart.get("history", history)
        faults = tuple(sorted((*faults, *chart.faults), key=lambda fault: fault.part))
    seen: Mapping[str, float] = parts.get("last_seen", {})
    active = [each for each in by_name.values() if each.task_count or each.llm_calls or each.tool_calls]
    caches: list[CacheStats] = parts.get("caches", [])
    pools: list[PoolStatus] = parts.get("pools", [])
    alerts: AlertOverview = parts.get("alerts", NO_ALERTS)
    firing = tuple(alert for alert in alerts.alerts if alert.state is AlertState.FIRING)
    found: tuple[WorkerInfo, ...] = parts.get("workers", ())
    failing_first = sorted(active, key=lambda each: (-each.failure_rate, -each.task_count))
    return Overview(
        server=perf.backend.address.masked,
        namespace=perf.backend.namespace,
        window=window,
        as_of=seconds_of(as_of),
        total=total,
        agents=tuple(
            AgentRow(each, seen.get(each.agent_name))
            for each in sorted(active, key=lambda each: (-each.task_count, each.agent_name))
        ),
        idle=len(by_name) - len(active),
        steps=tuple(merged_rows(rows) for rows in zip(*history.values(), strict=True)),
        workers=tuple(sorted(found, key=lambda worker: worker.alive)),
        running=tuple(sorted((each for worker in found for each in worker.running), key=lambda each: each.started)),
        problems=tuple(problems(failing_first, caches, pools, firing)),
        firing=firing,
        changes=parts.get("changes", NO_CHANGES) if known_changes is None else known_changes,
        caches=tuple(CacheRow(each) for each in sorted(caches, key=lambda each: (-each.hits - each.misses, each.name))),
        pools=tuple(sorted(map(PoolRow, pools), key=lambda row: (-row.load_share, row.name))),
        faults=faults,
    )


def max_steps(agents: int) -> int:
    """Return the maximum number of steps of the charts. Charts sum all agents, so more agents mean fewer steps.

    The server reads 10,000 slices of an agent in about 80 ms. For charts of 30 steps over 1000 agents, it took 0.4 s.
    """
    return max(MIN_STEPS, min(SPARKLINE_STEPS, MAX_SLICES // max(1, agents)))


async def read_overview(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    known_changes: Changes | None = None,
    charts: bool = True,
) -> Overview:
    """See `overview`."""
    return await perf.backend.arun(overview(perf, window, as_of=as_of, known_changes=known_changes, charts=charts))


async def read_changes(perf: AgentPerf, *, as_of: Timestamp = None) -> Changes:
    """See `changes`."""
    return await perf.backend.arun(changes(perf, as_of=as_of))
