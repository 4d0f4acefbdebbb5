"""The tabs of the first screen: agents, caches, pools and alerts. Each has its columns and its view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts.model import AlertState, AlertStatus
from agentperf_redis.command import Flow
from agentperf_redis.top import cells
from agentperf_redis.top.tables import Column
from agentperf_redis.views.agents import AgentRow, AgentSort, AgentsView, agents
from agentperf_redis.views.alerts import AlertSort, AlertsView, alerts
from agentperf_redis.views.caches import CacheRow, CacheSort, CachesView, caches
from agentperf_redis.views.pools import PoolRow, PoolSort, PoolsView, pools
from agentperf_redis.views.problems import BAD_FAILURE_RATE
from agentperf_redis.views.selection import Order
from agentperf_redis.views.text import counted, duration, short_number, size_text
from agentperf_redis.windows import Timestamp

MAX_ROWS = 200
"""Maximum number of rows of a tab. The filter and the order decide which."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a tab shows.

    Attributes:
        window: the window.
        sort: the column by which rows are sorted.
        descending: the direction; None for the column's default direction.
        match: the filter; empty for all rows.
        as_of: the time at which a paused screen shows the data; None for now.
    """

    window: str
    sort: Enum
    descending: bool | None = None
    match: str = ""
    as_of: Timestamp = None


@dataclass(frozen=True, slots=True)
class Shown:
    """The content of a tab.

    Attributes:
        rows: the rows.
        summary: a line about all rows.
        order: their order.
        matching: number of rows that match the filter.
        known: number of all rows.
    """

    rows: Sequence[Any]
    summary: str
    order: Order[Any]
    matching: int
    known: int


@dataclass(frozen=True, slots=True)
class Listing:
    """A tab.

    Attributes:
        name: its name.
        sort: the column by which its rows are sorted at first.
        columns: its columns; each press of `s` sorts by the next sortable column, in this order.
        key: identifies a row.
        read: returns the flow that reads the view.
        shown: returns the content of a view.
        empty: a text that says what to do if the namespace is empty.
    """

    name: str
    sort: Enum
    columns: tuple[Column[Any], ...]
    key: Callable[[Any], str]
    read: Callable[[AgentPerf, Asked], Flow[Any]]
    shown: Callable[[Any], Shown]
    empty: str


def _options(asked: Asked) -> dict[str, Any]:
    """Return the options that the views of all tabs share."""
    return {"as_of": asked.as_of, "descending": asked.descending, "match": asked.match, "limit": MAX_ROWS}


def _agents(perf: AgentPerf, asked: Asked) -> Flow[AgentsView]:
    return agents(perf, asked.window, sort=AgentSort(asked.sort), **_options(asked))


def _shown_agents(view: AgentsView) -> Shown:
    total = view.total
    about = "" if total.exact else "≈"
    tokens = total.tokens_in + total.tokens_out
    words = [
        f"{view.known} agents" if view.known != 1 else "1 agent",
        f"{counted(total.task_count, 'task')}, {cells.rate(total.throughput)}/s",
        f"{total.failure_count} failed ({total.failure_rate:.1%})",
    ]
    if total.task_count:
        words.append(f"p95 {about}{duration(total.p95_execution_time)}")
    if tokens or total.cost:
        words.append(f"{short_number(tokens)} tokens, cost {cells.money(total.cost)}")
    return Shown(view.rows, " · ".join(words), view.order, view.matching, view.known)


def _failure_style(row: AgentRow) -> str:
    if not row.errors:
        return ""
    return "bold red" if (row.failure_rate or 0.0) >= BAD_FAILURE_RATE else "yellow"


def _top_error(row: AgentRow) -> str:
    return "" if row.top_error is None else f"{row.top_error[0]} × {row.top_error[1]}"


AGENTS = Listing(
    "agents",
    AgentSort.TASKS,
    (
        Column[AgentRow]("agent", lambda row: row.name, AgentSort.NAME, 0, is_text=True),
        Column[AgentRow]("tasks", lambda row: short_number(row.tasks), AgentSort.TASKS, 0),
        Column[AgentRow]("per s", lambda row: cells.rate(row.rate), AgentSort.RATE, 2),
        Column[AgentRow]("errors", lambda row: short_number(row.errors), AgentSort.ERRORS, 3, style=_failure_style),
        Column[AgentRow](
            "failed", lambda row: cells.share(row.failure_rate), AgentSort.FAILURE_RATE, 0, style=_failure_style
        ),
        Column[AgentRow]("avg s", lambda row: cells.seconds(row.avg), AgentSort.AVERAGE, 6),
        Column[AgentRow]("p50 s", lambda row: cells.seconds(row.p50, exact=row.exact), AgentSort.P50, 2),
        Column[AgentRow]("p95 s", lambda row: cells.seconds(row.p95, exact=row.exact), AgentSort.P95, 0),
        Column[AgentRow]("p99 s", lambda row: cells.seconds(row.p99, exact=row.exact), AgentSort.P99, 4),
        Column[AgentRow]("tokens", lambda row: short_number(row.tokens), AgentSort.TOKENS, 5),
        Column[AgentRow]("cost", lambda row: cells.money(row.cost), AgentSort.COST, 5),
        Column[AgentRow]("last seen", lambda row: cells.age(row.age), AgentSort.LAST_SEEN, 3),
        Column[AgentRow]("over time", lambda row: cells.sparkline(row.sparkline), None, 4, is_text=True),
        Column[AgentRow]("top error", _top_error, None, 6, is_text=True),
    ),
    lambda row: row.name,
    _agents,
    _shown_agents,
    "No agent has recorded anything yet. Record one execution:\n\n"
    "    from agentperf_redis import AgentPerf\n"
    '    with AgentPerf() as perf, perf.metrics.track("planner"):\n'
    "        ...",
)


def _caches(perf: AgentPerf, asked: Asked) -> Flow[CachesView]:
    return caches(perf, asked.window, sort=CacheSort(asked.sort), **_options(asked))


def _shown_caches(view: CachesView) -> Shown:
    stored = sum(row.stats.bytes for row in view.rows)
    summary = f"{counted(view.known, 'cache')} · {size_text(stored)} of keys and values"
    return Shown(view.rows, summary, view.order, view.matching, view.known)


CACHES = Listing(
    "caches",
    CacheSort.HITS,
    (
        Column[CacheRow]("cache", lambda row: row.name, CacheSort.NAME, 0, is_text=True),
        Column[CacheRow]("kind", lambda row: row.kind, CacheSort.KIND, 4, is_text=True),
        Column[CacheRow]("entries", lambda row: short_number(row.stats.size), CacheSort.ENTRIES, 0),
        Column[CacheRow]("limit", lambda row: short_number(row.stats.max_size), None, 3),
        Column[CacheRow]("size", lambda row: size_text(row.stats.bytes), CacheSort.BYTES, 1),
        Column[CacheRow]("hits", lambda row: short_number(row.stats.hits), CacheSort.HITS, 2),
        Column[CacheRow]("misses", lambda row: short_number(row.stats.misses), CacheSort.MISSES, 2),
        Column[CacheRow]("hit rate", lambda row: cells.share(row.hit_rate), CacheSort.HIT_RATE, 0),
        Column[CacheRow]("in window", lambda row: cells.share(row.recent_hit_rate), None, 1),
        Column[CacheRow]("evicted", lambda row: short_number(row.stats.evictions), CacheSort.EVICTIONS, 3),
        Column[CacheRow]("saved s", lambda row: f"{row.stats.seconds_saved:.1f}", CacheSort.SAVED, 4),
        Column[CacheRow]("hit rate over time", lambda row: cells.sparkline(row.sparkline), None, 5, is_text=True),
    ),
    lambda row: f"{row.kind} {row.name}",
    _caches,
    _shown_caches,
    "No cache is in use. Programs make one at its first put:\n\n"
    '    answers = perf.cache("answers", max_size=1000, default_ttl=300)',
)


def _pools(perf: AgentPerf, asked: Asked) -> Flow[PoolsView]:
    return pools(perf, asked.window, sort=PoolSort(asked.sort), **_options(asked))


def _shown_pools(view: PoolsView) -> Shown:
    load, capacity = sum(row.load for row in view.rows), sum(row.capacity for row in view.rows)
    out, waiters = sum(len(row.out) for row in view.rows), sum(row.waiters for row in view.rows)
    summary = " · ".join(
        (
            counted(view.known, "pool"),
            f"load {load} of {capacity}",
            f"{counted(out, 'instance')} out",
            counted(waiters, "waiter"),
        )
    )
    return Shown(view.rows, summary, view.order, view.matching, view.known)


def _panic(row: PoolRow) -> str:
    return "PANIC" if row.status.panic_for is not None else "; ".join(f"{each.name}: {each.reason}" for each in row.out)


POOLS = Listing(
    "pools",
    PoolSort.LOAD_SHARE,
    (
        Column[PoolRow]("pool", lambda row: row.name, PoolSort.NAME, 0, is_text=True),
        Column[PoolRow]("strategy", lambda row: row.status.strategy.value, PoolSort.STRATEGY, 5, is_text=True),
        Column[PoolRow]("instances", lambda row: str(len(row.status.instances)), PoolSort.INSTANCES, 1),
        Column[PoolRow](
            "out", lambda row: str(len(row.out)), PoolSort.OUT, 0, style=lambda row: "red" if row.out else ""
        ),
        Column[PoolRow]("load", lambda row: f"{row.load}/{row.capacity}", PoolSort.LOAD, 0),
        Column[PoolRow]("used", lambda row: cells.share(row.load_share), PoolSort.LOAD_SHARE, 1),
        Column[PoolRow]("", lambda row: cells.bar(row.load_share), None, 3, is_text=True),
        Column[PoolRow](
            "waiters",
            lambda row: str(row.waiters),
            PoolSort.WAITERS,
            0,
            style=lambda row: "yellow" if row.waiters else "",
        ),
        Column[PoolRow]("granted", lambda row: short_number(row.status.granted), PoolSort.GRANTED, 3),
        Column[PoolRow]("overdue", lambda row: str(row.status.overdue), PoolSort.OVERDUE, 4),
        Column[PoolRow]("load over time", lambda row: cells.sparkline(row.sparkline), None, 4, is_text=True),
        Column[PoolRow]("out of rotation", _panic, None, 6, is_text=True, style=lambda _: "red"),
    ),
    lambda row: row.name,
    _pools,
    _shown_pools,
    "No instance is registered. Programs register one with:\n\n"
    '    lb.register_instance(AgentInstance(id="coder-1", agent_type="coder", max_capacity=5))',
)


def _alerts(perf: AgentPerf, asked: Asked) -> Flow[AlertsView]:
    return alerts(perf, sort=AlertSort(asked.sort), descending=asked.descending, match=asked.match, limit=MAX_ROWS)


def _shown_alerts(view: AlertsView) -> Shown:
    summary = " · ".join(
        (
            f"{view.firing} firing",
            counted(len(view.rules), "rule"),
            f"{len(view.silences)} silenced",
            f"{sum(each.waiting for each in view.receivers)} notifications wait",
        )
    )
    return Shown(view.alerts, summary, view.order, view.matching, view.known)


_STATE_STYLES = {AlertState.FIRING: "bold red", AlertState.PENDING: "yellow", AlertState.SILENCED: "yellow"}


def _alert_value(alert: AlertStatus) -> str:
    return cells.NONE if alert.value is None else f"{alert.value:.4g}"


ALERTS = Listing(
    "alerts",
    AlertSort.STATE,
    (
        Column[AlertStatus]("rule", lambda row: row.rule, AlertSort.RULE, 0, is_text=True),
        Column[AlertStatus](
            "state",
            lambda row: row.state.value.upper().replace("_", " "),
            AlertSort.STATE,
            0,
            is_text=True,
            style=lambda row: _STATE_STYLES.get(row.state, ""),
        ),
        Column[AlertStatus]("target", lambda row: row.target, AlertSort.TARGET, 0, is_text=True),
        Column[AlertStatus]("since", lambda row: cells.ago(row.since), AlertSort.SINCE, 1),
        Column[AlertStatus]("value", _alert_value, AlertSort.VALUE, 1),
        Column[AlertStatus]("when", lambda row: row.when, None, 2, is_text=True),
        Column[AlertStatus]("severity", lambda row: row.severity, AlertSort.SEVERITY, 3, is_text=True),
        Column[AlertStatus]("judged", lambda row: cells.ago(row.judged_at or None), None, 4),
    ),
    lambda row: f"{row.rule}\n{row.target}",
    _alerts,
    _shown_alerts,
    "No rule has judged anything yet. `agentperf alerts deploy FILE` deploys rules, and `agentperf alerts run`\n"
    "evaluates them.",
)

LISTINGS = (AGENTS, CACHES, POOLS, ALERTS)
