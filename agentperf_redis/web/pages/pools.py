"""The pages about pools: a list of all pools, and a page with the details of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from markupsafe import Markup

from agentperf_redis.balancer.history import PoolSeriesRow
from agentperf_redis.balancer.model import EventKind, InstanceState, PoolEvent
from agentperf_redis.views.pools import InstanceRow
from agentperf_redis.views.problems import state_text
from agentperf_redis.web.charts.lines import Line, line_chart
from agentperf_redis.web.charts.small import meter, sparkline
from agentperf_redis.web.pages.asked import PAGE_ROWS, Asked
from agentperf_redis.web.pages.rendering import Page, not_found
from agentperf_redis.web.pages.text import duration, number, plural, visible

MAX_INSTANCES: Final = 200
"""Maximum number of instances on one page. Each refresh sends all of them again, about 400 bytes for each."""

STATES: Final = {
    InstanceState.UP: "good",
    InstanceState.DRAINING: "",
    InstanceState.WARMING: "warn",
    InstanceState.HALF_OPEN: "warn",
    InstanceState.RATE_LIMITED: "warn",
    InstanceState.RESTING: "warn",
}
"""How each state looks. A state that is missing here looks bad."""

_GOOD_EVENTS: Final = {
    EventKind.HEALTHY,
    EventKind.HEARTBEAT_RESUMED,
    EventKind.UP,
    EventKind.RECOVERED,
    EventKind.WARM,
    EventKind.CALM,
    EventKind.RESTED,
}
_BAD_EVENTS: Final = {
    EventKind.UNHEALTHY,
    EventKind.HEARTBEAT_MISSED,
    EventKind.DOWN,
    EventKind.EJECTED,
    EventKind.PANIC,
    EventKind.EXPIRED,
}


async def pools(views: Any, asked: Asked) -> Page:
    """All pools."""
    view = await views.pools(asked.window, **asked.rows)
    values = {
        "view": view,
        "order": view.order,
        "match": view.match,
        "first": asked.page * PAGE_ROWS,
        "page": asked.page,
        "lines": {
            row.name: sparkline(row.sparkline, "Load over time")
            for row in view.rows
            if any(each is not None for each in row.sparkline)
        },
        "meters": {row.name: _load_meter(row.load, row.capacity) for row in view.rows},
    }
    return Page("pools.html", "Pools", values)


def _load_meter(load: int, capacity: int) -> Markup:
    return meter(load, capacity, f"Load {number(load)} of {number(capacity)}", style="s1" if load < capacity else "s2")


async def pool(views: Any, asked: Asked) -> Page:
    """One pool."""
    name = asked.text("name")
    view = await views.pool(name, asked.window)
    if view is None:
        return not_found("pool", name)
    steps = view.row.steps
    # Instances that take no work come first, then all other instances. Each group keeps the order of registration.
    instances = sorted(view.row.instances, key=lambda each: each.takes_work)
    first = asked.page * MAX_INSTANCES
    shown = instances[first : first + MAX_INSTANCES]
    values = {
        "view": view,
        "load": load_chart(steps),
        "waiters": waiters_chart(steps),
        "step_rows": [
            (step.interval.end, list(map(number, (step.load, step.waiters, step.unhealthy))))
            for step in reversed(steps)
        ],
        "sampled": any(step.load is not None for step in steps),
        "meters": {each.name: _load_meter(each.load, each.capacity) for each in shown},
        "instances": shown,
        "known": len(instances),
        "out": sum(not each.takes_work for each in instances),
        "first": first,
        "page": asked.page,
        "state_class": {state: STATES.get(state, "bad") for state in InstanceState},
        "state_text": state_text,
        "event_class": _event_class,
        "limits": _limits,
        "details": _details,
        "reason": _reason,
    }
    return Page("pool.html", name, values)


def _event_class(kind: EventKind) -> str:
    return "good" if kind in _GOOD_EVENTS else "bad" if kind in _BAD_EVENTS else ""


def _details(event: PoolEvent) -> str:
    """Return the further values of an event in words: ``for 40.0 s, in a row 3``."""
    found = []
    for name, value in event.details.items():
        is_time = name.endswith("_ms") and value.isascii() and value.isdigit()
        text = duration(int(value) / 1000) if is_time else visible(value)
        found.append(f"{visible(name.removesuffix('_ms') if is_time else name).replace('_', ' ')} {text}")
    return ", ".join(found)


def _reason(row: InstanceRow) -> str:
    """Return why an instance is not up. The time left of a rest or an ejection is in the page's own units."""
    status = row.status
    if status.state is InstanceState.RESTING:
        return f"rate-limited by its service, or cooled down, for {duration(status.resting_for)} more"
    if status.state is not InstanceState.EJECTED:
        return row.reason
    more = f", after {plural(status.ejections, 'ejection')} in a row" if status.ejections > 1 else ""
    return f"for its outcomes, for {duration(status.ejected_for)} more{more}"


def _limits(status: Any) -> str:
    """Return the rate limits of an instance in words; empty without limits."""
    found = [
        f"{number(limit)} {unit}/min"
        for limit, unit in ((status.requests_per_minute, "requests"), (status.tokens_per_minute, "tokens"))
        if limit < float("inf")
    ]
    return ", ".join(found)


def load_chart(steps: Sequence[PoolSeriesRow]) -> Markup:
    """Return the chart of the load over time."""
    line = Line("load", [step.load for step in steps])
    return line_chart(
        [step.interval for step in steps], [line], number, "Line chart of the leases of the pool over time"
    )


def waiters_chart(steps: Sequence[PoolSeriesRow]) -> Markup:
    """Return the chart of waiters and unhealthy instances over time."""
    lines = [
        Line("waiters", [step.waiters for step in steps], "s1"),
        Line("unhealthy instances", [step.unhealthy for step in steps], "s2"),
    ]
    label = "Line chart of callers in the queue and of unhealthy instances over time"
    return line_chart([step.interval for step in steps], lines, number, label, whole=True)
