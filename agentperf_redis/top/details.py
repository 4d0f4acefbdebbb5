"""The screens of one agent, one cache and one pool: what they read, their charts and their tables."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.history import PoolSeriesRow
from agentperf_redis.balancer.model import LeaseStatus, PoolEvent, WaiterStatus
from agentperf_redis.cache.flows.ranking import EntryRanking, EntryRankings, RankedEntry, TagUse
from agentperf_redis.cache.history import CacheSeriesRow
from agentperf_redis.command import Flow
from agentperf_redis.metrics.model import Execution, ModelUsage
from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.metrics.spans import SpanMetrics
from agentperf_redis.metrics.workers import RunningExecution
from agentperf_redis.top import cells
from agentperf_redis.top.tables import Column
from agentperf_redis.views.agents import AgentView, agent
from agentperf_redis.views.caches import ENTRIES_EVERY_S, CacheView, TierRow, cache
from agentperf_redis.views.pools import InstanceRow, PoolView, pool
from agentperf_redis.views.text import counted, duration, length_of_time, short_number, size_text
from agentperf_redis.windows import Timestamp

V = TypeVar("V")

MAX_SHOWN = 200
"""Maximum number of rows of a table."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A line of bars over time.

    Attributes:
        title: its title, with the unit.
        values: one value per time step; None for a step without a value.
        shown: returns the text of a value.
    """

    title: str
    values: tuple[float | None, ...]
    shown: Callable[[float], str]


@dataclass(frozen=True)  # without slots, because `Part[X](...)` fails with slots
class Part(Generic[V]):
    """A tab of a screen: a table.

    Attributes:
        name: name of the tab.
        columns: its columns.
        key: identifies a row.
        rows: returns the rows of a view.
    """

    name: str
    columns: tuple[Column[Any], ...]
    key: Callable[[Any], str]
    rows: Callable[[V], Sequence[Any]]


class Detail(Generic[V]):
    """One agent, cache or pool.

    Args:
        name: its name.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[Part[Any], ...]]

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def read(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[V | None]:
        """Return the flow that reads the view. Its result is None if the agent, cache or pool does not exist."""

    @abstractmethod
    def summary(self, view: V) -> list[str]:
        """Return at most two lines."""

    @abstractmethod
    def charts(self, view: V) -> list[Chart]:
        """Return two charts."""


def _ended(row: Execution) -> str:
    return cells.clock(row.ended.timestamp())


def _outcome(row: Execution) -> str:
    if row.success:
        return "ok"
    return "cancelled" if row.cancelled else f"failed: {row.error_type or 'unknown'}"


def _timed(value: Callable[[SeriesRow], float]) -> Callable[[SeriesRow], str]:
    return lambda row: f"≈{cells.seconds(value(row))}" if row.tasks else cells.NONE


_EXECUTIONS: tuple[Column[Execution], ...] = (
    Column("ended", _ended, None, 0, is_text=True),
    Column("seconds", lambda row: cells.seconds(row.seconds), None, 0),
    Column("result", _outcome, None, 0, is_text=True, style=lambda row: "" if row.success else "yellow"),
)


@dataclass(frozen=True, slots=True)
class _ErrorRow:
    """Errors of one type in the window."""

    name: str
    count: int
    share: float
    over_time: tuple[int, ...]
    last_step: float | None


def _error_rows(view: AgentView) -> list[_ErrorRow]:
    counts = view.metrics.error_types
    total = sum(counts.values())
    rows = []
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        over_time = tuple(step.error_types.get(name, 0) for step in view.steps)
        last = next((step.interval.end for step in reversed(view.steps) if step.error_types.get(name)), None)
        rows.append(_ErrorRow(name, count, count / total, over_time, last))
    return rows


@dataclass(frozen=True, slots=True)
class _ModelRow:
    """The agent's usage of one model in the window."""

    name: str
    use: ModelUsage


def _model_rows(view: AgentView) -> list[_ModelRow]:
    models = sorted(view.metrics.models.items(), key=lambda item: (-item[1].calls, item[0]))
    return [_ModelRow(name, use) for name, use in models]


class AgentDetail(Detail[AgentView]):
    """One agent: percentiles over time, errors, spans, models, slowest, latest and running executions."""

    kind = "agent"
    parts = (
        Part[AgentView](
            "Over time",
            (
                Column[SeriesRow]("from", lambda row: cells.start(row.interval), None, 0, is_text=True),
                Column[SeriesRow]("tasks", lambda row: short_number(row.tasks), None, 0),
                Column[SeriesRow](
                    "errors", lambda row: str(row.errors), None, 0, style=lambda row: "yellow" if row.errors else ""
                ),
                Column[SeriesRow]("p50 s", _timed(lambda row: row.p50), None, 1),
                Column[SeriesRow]("p95 s", _timed(lambda row: row.p95), None, 0),
                Column[SeriesRow]("p99 s", _timed(lambda row: row.p99), None, 1),
                Column[SeriesRow]("max s", lambda row: cells.seconds(row.max if row.tasks else None), None, 2),
                Column[SeriesRow]("tokens", lambda row: short_number(row.tokens), None, 3),
                Column[SeriesRow]("cost", lambda row: cells.money(row.cost), None, 3),
            ),
            lambda row: str(row.interval.start),
            lambda view: view.steps[::-1],
        ),
        Part[AgentView](
            "Errors",
            (
                Column[_ErrorRow]("error", lambda row: row.name, None, 0, is_text=True),
                Column[_ErrorRow]("number", lambda row: str(row.count), None, 0),
                Column[_ErrorRow]("share", lambda row: cells.share(row.share), None, 1),
                Column[_ErrorRow]("last", lambda row: cells.ago(row.last_step), None, 1),
                Column[_ErrorRow]("over time", lambda row: cells.sparkline(row.over_time, 30), None, 2, is_text=True),
            ),
            lambda row: row.name,
            _error_rows,
        ),
        Part[AgentView](
            "Spans",
            (
                Column[SpanMetrics]("stage", lambda row: row.name or "(outside of spans)", None, 0, is_text=True),
                Column[SpanMetrics]("share", lambda row: cells.share(row.share), None, 0),
                Column[SpanMetrics]("", lambda row: cells.bar(row.share), None, 2, is_text=True),
                Column[SpanMetrics]("self s", lambda row: cells.seconds(row.self_time), None, 0),
                Column[SpanMetrics]("number", lambda row: short_number(row.metrics.task_count), None, 1),
                Column[SpanMetrics]("failed", lambda row: str(row.metrics.failure_count), None, 2),
                Column[SpanMetrics](
                    "p95 s",
                    lambda row: cells.seconds(row.metrics.p95_execution_time, exact=row.metrics.exact),
                    None,
                    1,
                ),
            ),
            lambda row: row.name,
            lambda view: view.spans.spans,
        ),
        Part[AgentView](
            "Models",
            (
                Column[_ModelRow]("model", lambda row: row.name, None, 0, is_text=True),
                Column[_ModelRow]("calls", lambda row: short_number(row.use.calls), None, 0),
                Column[_ModelRow]("tokens in", lambda row: short_number(row.use.tokens_in), None, 0),
                Column[_ModelRow]("cached", lambda row: short_number(row.use.tokens_cached_in), None, 2),
                Column[_ModelRow]("tokens out", lambda row: short_number(row.use.tokens_out), None, 0),
                Column[_ModelRow]("reasoning", lambda row: short_number(row.use.tokens_reasoning), None, 2),
                Column[_ModelRow]("cost", lambda row: cells.money(row.use.cost), None, 0),
            ),
            lambda row: row.name,
            _model_rows,
        ),
        Part[AgentView]("Slowest", _EXECUTIONS, lambda row: f"{row.ended} {row.seconds}", lambda view: view.slowest),
        Part[AgentView]("Latest", _EXECUTIONS, lambda row: f"{row.ended} {row.seconds}", lambda view: view.recent),
        Part[AgentView](
            "Running",
            (
                Column[RunningExecution]("worker", lambda row: f"{row.host}:{row.pid}", None, 0, is_text=True),
                Column[RunningExecution]("for s", lambda row: f"{row.age:.1f}", None, 0),
                Column[RunningExecution](
                    "began", lambda row: cells.clock(row.started.timestamp()), None, 1, is_text=True
                ),
                Column[RunningExecution](
                    "state", lambda row: "runs" if row.alive else "its worker is lost", None, 0, is_text=True
                ),
            ),
            lambda row: f"{row.host} {row.pid} {row.started}",
            lambda view: view.running,
        ),
    )

    def read(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[AgentView | None]:
        """See `Detail.read`."""
        found = yield from agent(perf, self.name, window, as_of=as_of)
        return found if found.known else None

    def summary(self, view: AgentView) -> list[str]:
        """See `Detail.summary`."""
        found = view.metrics
        about = "" if found.exact else "≈"
        first = [
            f"{counted(found.task_count, 'task')}, {cells.rate(found.throughput)}/s",
            f"{found.failure_count} failed ({found.failure_rate:.1%})",
            f"{found.cancelled_count} cancelled",
            f"{len(view.running)} running for over 1 s",
        ]
        times = " ".join(
            f"{name} {about}{duration(value)}"
            for name, value in (
                ("p50", found.p50_execution_time),
                ("p95", found.p95_execution_time),
                ("p99", found.p99_execution_time),
            )
        )
        second = [times if found.task_count else "no execution in the window"]
        tokens = found.tokens_in + found.tokens_out
        if tokens or found.cost:
            second.append(f"{short_number(tokens)} tokens, cost {cells.money(found.cost)}")
        if view.before is not None and view.before["p95_execution_time"].certain:
            change = view.before["p95_execution_time"]
            second.append(f"p95 {'up' if change.difference > 0 else 'down'} from {duration(change.first)} before")
        return [" · ".join(first), " · ".join(second)]

    def charts(self, view: AgentView) -> list[Chart]:
        """See `Detail.charts`."""
        return [
            Chart("tasks a step", tuple(step.tasks for step in view.steps), short_number),
            Chart("p95", tuple(step.p95 if step.tasks else None for step in view.steps), duration),
        ]


def _ranked(by: EntryRanking) -> Callable[[CacheView], Sequence[RankedEntry]]:
    return lambda view: () if view.entries is None else view.entries.best[by]


_ENTRIES: tuple[Column[RankedEntry], ...] = (
    Column("key", lambda row: row.name, None, 0, is_text=True),
    Column("size", lambda row: size_text(row.size_bytes), None, 0),
    Column("reads", lambda row: short_number(row.reads), None, 0),
    Column("computed in s", lambda row: cells.seconds(row.compute_seconds or None), None, 1),
    Column("saved s", lambda row: f"{row.saved_seconds:.1f}", None, 2),
    Column("tags", lambda row: ", ".join(sorted(row.tags)), None, 3, is_text=True),
)


class CacheDetail(Detail[CacheView]):
    """One cache: tiers, hit rate over time, top entries, tags.

    Args:
        name: the cache.
        cache_kind: "lru" or "tiered".
    """

    kind = "cache"
    parts = (
        Part[CacheView](
            "Tiers",
            (
                Column[TierRow]("tier", lambda row: row.name, None, 0, is_text=True),
                Column[TierRow]("entries", lambda row: short_number(row.stats.size), None, 0),
                Column[TierRow]("limit", lambda row: short_number(row.stats.max_size), None, 0),
                Column[TierRow]("", lambda row: cells.bar(row.stats.size / row.stats.max_size), None, 2, is_text=True),
                Column[TierRow](
                    "default TTL", lambda row: "none" if row.default_ttl is None else f"{row.default_ttl:g} s", None, 1
                ),
                Column[TierRow]("hits", lambda row: short_number(row.stats.hits), None, 0),
                Column[TierRow]("misses", lambda row: short_number(row.stats.misses), None, 0),
                Column[TierRow]("hit rate", lambda row: cells.share(row.stats.hit_rate), None, 0),
            ),
            lambda row: row.name,
            lambda view: view.tiers,
        ),
        Part[CacheView](
            "Over time",
            (
                Column[CacheSeriesRow]("from", lambda row: cells.start(row.interval), None, 0, is_text=True),
                Column[CacheSeriesRow]("hits", lambda row: _known(row.hits), None, 0),
                Column[CacheSeriesRow]("misses", lambda row: _known(row.misses), None, 0),
                Column[CacheSeriesRow]("hit rate", lambda row: cells.share(row.hit_rate), None, 0),
                Column[CacheSeriesRow]("", lambda row: cells.bar(row.hit_rate or 0.0), None, 2, is_text=True),
                Column[CacheSeriesRow]("evicted", lambda row: _known(row.evictions), None, 1),
                Column[CacheSeriesRow]("entries", lambda row: _known(row.size), None, 1),
            ),
            lambda row: str(row.interval.start),
            lambda view: view.row.steps[::-1],
        ),
        Part[CacheView]("Most read", _ENTRIES, lambda row: row.name, _ranked(EntryRanking.READS)),
        Part[CacheView]("Largest", _ENTRIES, lambda row: row.name, _ranked(EntryRanking.SIZE)),
        Part[CacheView]("Costliest", _ENTRIES, lambda row: row.name, _ranked(EntryRanking.COST)),
        Part[CacheView](
            "Tags",
            (
                Column[TagUse]("tag", lambda row: row.tag, None, 0, is_text=True),
                Column[TagUse]("entries", lambda row: short_number(row.entries), None, 0),
                Column[TagUse]("size", lambda row: size_text(row.size_bytes), None, 0),
            ),
            lambda row: row.tag,
            lambda view: () if view.entries is None else view.entries.tags,
        ),
    )

    def __init__(self, name: str, cache_kind: str) -> None:
        super().__init__(name)
        self._cache_kind = cache_kind
        self._entries: EntryRankings | None = None
        self._read_at = 0.0

    def read(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[CacheView | None]:
        """See `Detail.read`."""
        due = self._entries is None or time.monotonic() - self._read_at > ENTRIES_EVERY_S
        view = yield from cache(perf, self.name, window, as_of=as_of, kind=self._cache_kind, entries=due)
        if view is None:
            return None
        if view.entries is not None:
            self._entries, self._read_at = view.entries, time.monotonic()
        return replace(view, entries=self._entries)

    def summary(self, view: CacheView) -> list[str]:
        """See `Detail.summary`."""
        stats = view.row.stats
        limit = "" if stats.max_bytes is None else f" of {size_text(stats.max_bytes)}"
        used = "" if view.last_used is None else f" · last use {cells.ago(view.last_used.timestamp())}"
        size = f"{stats.size} of {counted(stats.max_size, 'entry', 'entries')}, {size_text(stats.bytes)}{limit}"
        shards = f", {stats.settings.shards} shards" if stats.settings.shards > 1 else ""
        reads = f"{counted(stats.hits, 'hit')}, {counted(stats.misses, 'miss', 'misses')}"
        rates = f"hit rate {cells.share(view.row.hit_rate)}, in the window {cells.share(view.row.recent_hit_rate)}"
        rest = f"{stats.evictions} evicted · {stats.corrupt} damaged · {stats.seconds_saved:.1f} s saved"
        return [
            f"{view.kind} cache, policy {stats.settings.policy.value}{shards} · {size}{used}",
            f"{reads}, {rates} · {rest}",
        ]

    def charts(self, view: CacheView) -> list[Chart]:
        """See `Detail.charts`."""
        return [
            Chart("hit rate", view.row.sparkline, cells.share),
            Chart("entries", tuple(step.size for step in view.row.steps), short_number),
        ]


def _known(number: float | None) -> str:
    return cells.NONE if number is None else short_number(number)


def _event_details(event: PoolEvent) -> str:
    return " ".join(f"{name}={value}" for name, value in event.details.items())


class PoolDetail(Detail[PoolView]):
    """One pool: state and load of each instance, leases, waiters, events, charts over time."""

    kind = "pool"
    parts = (
        Part[PoolView](
            "Instances",
            (
                Column[InstanceRow]("instance", lambda row: row.name, None, 0, is_text=True),
                Column[InstanceRow](
                    "state",
                    lambda row: row.status.state.value.replace("_", " "),
                    None,
                    0,
                    is_text=True,
                    style=lambda row: "" if row.is_up else "yellow" if row.takes_work else "red",
                ),
                Column[InstanceRow]("load", lambda row: f"{row.load}/{row.capacity}", None, 0),
                Column[InstanceRow]("", lambda row: cells.bar(row.load_share), None, 1, is_text=True),
                Column[InstanceRow]("limit", lambda row: str(row.status.limit), None, 2),
                Column[InstanceRow]("peak", lambda row: str(row.status.peak_load), None, 4),
                Column[InstanceRow]("ok", lambda row: short_number(row.status.served), None, 2),
                Column[InstanceRow]("failed", lambda row: short_number(row.status.failed), None, 2),
                Column[InstanceRow]("ms", lambda row: f"{row.status.instance.response_time_ms:.1f}", None, 3),
                Column[InstanceRow]("since", lambda row: "" if row.since is None else cells.ago(row.since), None, 2),
                Column[InstanceRow]("why", lambda row: row.reason, None, 2, is_text=True),
            ),
            lambda row: row.name,
            lambda view: view.row.instances[:MAX_SHOWN],
        ),
        Part[PoolView](
            "Leases",
            (
                Column[LeaseStatus]("holder", lambda row: row.process, None, 0, is_text=True),
                Column[LeaseStatus]("instance", lambda row: row.instance_id, None, 0, is_text=True),
                Column[LeaseStatus]("held for", lambda row: length_of_time(row.held_for), None, 0),
                Column[LeaseStatus]("expires in s", lambda row: f"{row.expires_in:.1f}", None, 1),
                Column[LeaseStatus]("fence", lambda row: str(row.fence), None, 3),
                Column[LeaseStatus](
                    "state", lambda row: "held" if row.fetched else "granted, not fetched", None, 2, is_text=True
                ),
            ),
            lambda row: row.token,
            lambda view: sorted(view.leases.leases, key=lambda lease: -lease.held_for)[:MAX_SHOWN],
        ),
        Part[PoolView](
            "Waiters",
            (
                Column[WaiterStatus]("waiter", lambda row: row.process, None, 0, is_text=True),
                Column[WaiterStatus]("waited s", lambda row: f"{row.waited:.1f}", None, 0),
                Column[WaiterStatus](
                    "requires", lambda row: ", ".join(sorted(row.require)) or "nothing", None, 1, is_text=True
                ),
            ),
            lambda row: row.token,
            lambda view: view.leases.waiters[:MAX_SHOWN],
        ),
        Part[PoolView](
            "Events",
            (
                Column[PoolEvent]("at", lambda row: cells.clock(row.at), None, 0, is_text=True),
                Column[PoolEvent]("event", lambda row: row.kind.value.replace("_", " "), None, 0, is_text=True),
                Column[PoolEvent]("instance", lambda row: row.instance_id or "", None, 0, is_text=True),
                Column[PoolEvent]("details", _event_details, None, 1, is_text=True),
            ),
            lambda row: row.cursor,
            lambda view: view.events,
        ),
        Part[PoolView](
            "Over time",
            (
                Column[PoolSeriesRow]("from", lambda row: cells.start(row.interval), None, 0, is_text=True),
                Column[PoolSeriesRow](
                    "load", lambda row: cells.NONE if row.load is None else f"{row.load:.1f}", None, 0
                ),
                Column[PoolSeriesRow]("waiters", lambda row: _known(row.waiters), None, 0),
                Column[PoolSeriesRow]("unhealthy", lambda row: _known(row.unhealthy), None, 0),
            ),
            lambda row: str(row.interval.start),
            lambda view: view.row.steps[::-1],
        ),
    )

    def read(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[PoolView | None]:
        """See `Detail.read`."""
        return pool(perf, self.name, window, as_of=as_of)

    def summary(self, view: PoolView) -> list[str]:
        """See `Detail.summary`."""
        row, status = view.row, view.row.status
        panic = "" if status.panic_for is None else f" · PANIC for {length_of_time(status.panic_for)}"
        load = f"load {row.load} of {row.capacity} · {counted(row.waiters, 'waiter')}"
        return [
            f"{status.strategy.value} · {counted(len(row.instances), 'instance')}, {len(row.out)} out{panic}",
            f"{load} · {status.granted} granted · {status.overdue} overdue",
        ]

    def charts(self, view: PoolView) -> list[Chart]:
        """See `Detail.charts`."""
        return [
            Chart("load", view.row.sparkline, lambda value: f"{value:.1f}"),
            Chart("waiters", tuple(step.waiters for step in view.row.steps), short_number),
        ]
