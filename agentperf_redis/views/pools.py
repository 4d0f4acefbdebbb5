"""The pools of a namespace, and one pool in depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.history import PoolSeriesRow
from agentperf_redis.balancer.model import InstanceState, InstanceStatus, PoolEvent, PoolLeases, PoolStatus
from agentperf_redis.balancer.operations import MAX_EVENTS, Operations
from agentperf_redis.command import Flow
from agentperf_redis.views.agents import seconds_of
from agentperf_redis.views.problems import RECOVERING
from agentperf_redis.views.reading import Fault, Parts
from agentperf_redis.views.reasons import Reason, has_reasons, reasons_of
from agentperf_redis.views.selection import Order, order_of, selected
from agentperf_redis.views.timeline import (
    CHART_STEPS,
    DEFAULT_WINDOW,
    MAX_HISTORIES,
    SPARKLINE_STEPS,
    check_window,
    steps_read,
)
from agentperf_redis.windows import Timestamp

SHOWN_EVENTS = 50


class PoolSort(Enum):
    """The columns by which pools are sorted."""

    NAME = "name"
    STRATEGY = "strategy"
    INSTANCES = "instances"
    OUT = "out"
    LOAD = "load"
    LOAD_SHARE = "load_share"
    WAITERS = "waiters"
    GRANTED = "granted"
    OVERDUE = "overdue"


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One instance of a pool.

    Attributes:
        status: its status, as `LoadBalancer.status` returns it.
        why: the reason why it takes no work, or only one lease at a time; None if neither applies.
    """

    status: InstanceStatus
    why: Reason | None = None

    @property
    def name(self) -> str:
        """The instance."""
        return self.status.instance.id

    @property
    def load(self) -> int:
        """Its leases."""
        return self.status.instance.current_load

    @property
    def capacity(self) -> int:
        """Its registered capacity. `InstanceStatus.limit` is the part that is usable at present."""
        return self.status.instance.max_capacity

    @property
    def load_share(self) -> float:
        """Load divided by capacity. It may exceed 1 after the capacity was lowered."""
        return self.load / self.capacity

    @property
    def takes_work(self) -> bool:
        """Whether the instance takes work, even if only a limited amount."""
        return self.status.state is InstanceState.UP or self.status.state in RECOVERING

    @property
    def is_up(self) -> bool:
        """Whether the instance takes work up to its full capacity."""
        return self.status.state is InstanceState.UP

    @property
    def reason(self) -> str:
        """Why it is not up, in words; empty if it is up."""
        if self.status.state is InstanceState.WARMING:
            return f"warming up: {self.status.limit} of {self.capacity} usable"
        return "" if self.why is None else self.why.text

    @property
    def since(self) -> float | None:
        """When its state began, s since 1970 by the server's clock; None if it is up, or if the time is unknown."""
        return None if self.why is None else self.why.since


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One pool.

    Attributes:
        status: its status now, as `LoadBalancer.status` returns it.
        steps: the window step by step, oldest first. A step in which no process used the pool has no figures. In a view
            of many pools, only the first `MAX_HISTORIES` rows have steps.
        events: its events, oldest first; empty if they were not read. They show when an instance stopped taking work.
    """

    status: PoolStatus
    steps: tuple[PoolSeriesRow, ...] = ()
    events: tuple[PoolEvent, ...] = ()

    @property
    def name(self) -> str:
        """The pool."""
        return self.status.agent_type

    @property
    def instances(self) -> tuple[InstanceRow, ...]:
        """Its instances, in the order of their registration."""
        reasons = reasons_of(self.status, self.events)
        return tuple(InstanceRow(each, reasons.get(each.instance.id)) for each in self.status.instances)

    @property
    def out(self) -> tuple[InstanceRow, ...]:
        """The instances that take no work."""
        return tuple(each for each in self.instances if not each.takes_work)

    @property
    def load(self) -> int:
        """Leases on all instances."""
        return self.status.current_load

    @property
    def capacity(self) -> int:
        """Sum of the capacities of all instances."""
        return self.status.total_capacity

    @property
    def load_share(self) -> float:
        """Load divided by capacity."""
        return self.load / self.capacity if self.capacity else 0.0

    @property
    def waiters(self) -> int:
        """Callers in the queue."""
        return self.status.waiting

    @property
    def sparkline(self) -> tuple[float | None, ...]:
        """Mean load of each step; None for a step in which no process used the pool."""
        return tuple(step.load for step in self.steps)


@dataclass(frozen=True, slots=True)
class PoolsView:
    """The pools of a namespace.

    Attributes:
        window: the window of the steps.
        as_of: its end, s since 1970; None for now. The status is always current.
        rows: the pools of this page, filtered and sorted.
        matching: number of pools that match the filter.
        known: number of all pools.
        order: the order of the rows.
        match: the filter.
        faults: parts that could not be read.
    """

    window: str | float
    as_of: float | None
    rows: tuple[PoolRow, ...]
    matching: int
    known: int
    order: Order[PoolSort]
    match: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class PoolView:
    """One pool in depth.

    Attributes:
        name: the pool.
        window: the window of the steps.
        as_of: its end, s since 1970; None for now.
        row: its current status, and its steps in the window.
        leases: the leases with their holders, and the waiters in queue order.
        events: the latest events, the newest first.
        faults: parts that could not be read.
    """

    name: str
    window: str | float
    as_of: float | None
    row: PoolRow
    leases: PoolLeases
    events: tuple[PoolEvent, ...]
    faults: tuple[Fault, ...]


_VALUES: Mapping[PoolSort, Callable[[PoolRow], Any]] = {
    PoolSort.NAME: lambda row: row.name,
    PoolSort.STRATEGY: lambda row: row.status.strategy.value,
    PoolSort.INSTANCES: lambda row: len(row.status.instances),
    PoolSort.OUT: lambda row: len(row.out),
    PoolSort.LOAD: lambda row: row.load,
    PoolSort.LOAD_SHARE: lambda row: row.load_share,
    PoolSort.WAITERS: lambda row: row.waiters,
    PoolSort.GRANTED: lambda row: row.status.granted,
    PoolSort.OVERDUE: lambda row: row.status.overdue,
}


def operations_of(perf: AgentPerf) -> Operations:
    """Return the operations of the load balancer, which make the flows."""
    return perf.balancer()._operations  # noqa: SLF001  the flows are not part of the public API


def pools(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: PoolSort | str = PoolSort.LOAD_SHARE,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
) -> Flow[PoolsView]:
    """Read the pools. The call itself checks the arguments, which are those of `agents.agents`."""
    check_window(window, as_of)
    order = order_of(sort, descending, PoolSort, upward=(PoolSort.NAME, PoolSort.STRATEGY))
    selected((), _name, _VALUES, order, match, limit, offset)  # checks the arguments
    return _pools(perf, window, as_of, order, match, limit, offset)


def _name(row: PoolRow) -> str:
    return row.name


def _pools(
    perf: AgentPerf,
    window: str | float,
    as_of: Timestamp,
    order: Order[PoolSort],
    match: str,
    limit: int,
    offset: int,
) -> Flow[PoolsView]:
    parts = Parts(pools=operations_of(perf).status(()))
    yield from parts.read()
    every: list[PoolStatus] = parts.get("pools", [])
    found = selected(map(PoolRow, every), _name, _VALUES, order, match, limit, offset)
    charts = Parts(
        **{
            f"history of pool {row.name}": _steps(perf, row.name, window, as_of, SPARKLINE_STEPS)
            for row in found.rows[:MAX_HISTORIES]
        }
    )
    if found.rows:
        yield from charts.read()
    rows = tuple(PoolRow(row.status, charts.get(f"history of pool {row.name}", ())) for row in found.rows)
    return PoolsView(
        window, seconds_of(as_of), rows, found.matching, found.total, order, match, parts.faults + charts.faults
    )


def _steps(
    perf: AgentPerf, name: str, window: str | float, as_of: Timestamp, most: int
) -> Flow[tuple[PoolSeriesRow, ...]]:
    operations = operations_of(perf)
    return steps_read(lambda step: operations.series(name, window, step, as_of), (), window, as_of, most)


def pool(
    perf: AgentPerf, name: str, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> Flow[PoolView | None]:
    """Read one pool; None if it has no instances. The call itself checks the arguments.

    Args:
        perf: the client.
        name: the pool.
        window: length of the window.
        as_of: end of the window; None for now.
    """
    arguments.name("name", name)
    check_window(window, as_of)
    return _pool(perf, name, window, as_of)


def _pool(perf: AgentPerf, name: str, window: str | float, as_of: Timestamp) -> Flow[PoolView | None]:
    operations = operations_of(perf)
    found = yield from operations.status((name,))
    if not found:
        return None
    # If an instance takes no work, or only one lease at a time, read more events: the event with the reason may be old.
    limit = MAX_EVENTS if has_reasons(found[0]) else SHOWN_EVENTS
    parts = Parts(
        leases=operations.leases(name),
        events=operations.events(name, None, limit),
        history=_steps(perf, name, window, as_of, CHART_STEPS),
    )
    yield from parts.read()
    events: list[PoolEvent] = parts.get("events", [])
    return PoolView(
        name,
        window,
        seconds_of(as_of),
        PoolRow(found[0], parts.get("history", ()), tuple(events)),
        parts.get("leases", PoolLeases(name, (), ())),
        tuple(reversed(events[-SHOWN_EVENTS:])),
        parts.faults,
    )


async def read_pools(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: PoolSort | str = PoolSort.LOAD_SHARE,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
) -> PoolsView:
    """See `pools`."""
    flow = pools(perf, window, as_of=as_of, sort=sort, descending=descending, match=match, limit=limit, offset=offset)
    return await perf.backend.arun(flow)


async def read_pool(
    perf: AgentPerf, name: str, window: str | float = DEFAULT_WINDOW, *, as_of: Timestamp = None
) -> PoolView | None:
    """See `pool`."""
    return await perf.backend.arun(pool(perf, name, window, as_of=as_of))
