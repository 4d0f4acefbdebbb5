"""`agentperf top` without a terminal: prints one line per tick, like `redis-cli --stat`. It needs no extra package."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentperf_redis.top import cells
from agentperf_redis.views.overview import Overview
from agentperf_redis.views.text import seconds_cell, short_number

HEAD_EVERY = 20
"""The titles are printed again after this many lines."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A column.

    Attributes:
        title: its title.
        width: its width.
        text: returns its text.
    """

    title: str
    width: int
    text: Callable[[Overview], str]


def _time(overview: Overview) -> str:
    """Return the time of the reading by the server's clock, or by this machine's clock if there are no agents."""
    return time.strftime("%H:%M:%S", time.localtime(overview.interval.end or None))


def _p95(overview: Overview) -> str:
    total = overview.total
    if not total.task_count:
        return cells.NONE
    return f"{'' if total.exact else '≈'}{seconds_cell(total.p95_execution_time)}"


def hit_rate(overview: Overview) -> float | None:
    """Return the hit rate of all caches together since their first use; None without reads."""
    hits = sum(row.stats.hits for row in overview.caches)
    reads = sum(row.reads for row in overview.caches)
    return hits / reads if reads else None


FIGURES = (
    Figure("time", 8, _time),
    Figure("tasks", 6, lambda overview: short_number(overview.total.task_count)),
    Figure("per s", 6, lambda overview: cells.rate(overview.total.throughput)),
    Figure("failed", 6, lambda overview: cells.share(overview.total.failure_rate)),
    Figure("p95 s", 8, _p95),
    Figure("cost", 6, lambda overview: cells.money(overview.total.cost)),
    Figure("workers", 7, lambda overview: str(overview.workers_alive)),
    Figure("hits", 6, lambda overview: cells.share(hit_rate(overview))),
    Figure("load", 6, lambda overview: "/".join(map(str, _load(overview)))),
    Figure("queue", 5, lambda overview: str(_waiters(overview))),
    Figure("firing", 6, lambda overview: str(len(overview.firing))),
)
"""The columns. Together they are 80 characters wide."""
_FIRST_LEFT_OUT = ("workers", "hits", "cost", "queue")
"""If the terminal is narrower, these columns are left out, in this order."""


def _load(overview: Overview) -> tuple[int, int]:
    return sum(row.load for row in overview.pools), sum(row.capacity for row in overview.pools)


def _waiters(overview: Overview) -> int:
    return sum(row.waiters for row in overview.pools)


def _fitting(width: int) -> list[Figure]:
    figures = list(FIGURES)
    for title in _FIRST_LEFT_OUT:
        if sum(figure.width + 1 for figure in figures) > width + 1:
            figures = [figure for figure in figures if figure.title != title]
    return figures


def head(width: int = 80) -> str:
    """Return the titles that fit into `width` characters, but at least the most important ones."""
    return " ".join(figure.title.rjust(figure.width) for figure in _fitting(width))


def line(overview: Overview, width: int = 80) -> str:
    """Return the line of a reading. Its columns are those of `head`."""
    return " ".join(figure.text(overview).rjust(figure.width) for figure in _fitting(width))


def plain(overview: Overview) -> dict[str, Any]:
    """Return the fields of the --json output."""
    total = overview.total
    load, capacity = _load(overview)
    return {
        "server": overview.server,
        "namespace": overview.namespace,
        "window": overview.window,
        "start": overview.interval.start,
        "end": overview.interval.end,
        "tasks": total.task_count,
        "failures": total.failure_count,
        "cancelled": total.cancelled_count,
        "throughput_per_s": total.throughput,
        "p50_s": total.p50_execution_time,
        "p95_s": total.p95_execution_time,
        "p99_s": total.p99_execution_time,
        "percentiles_exact": total.exact,
        "tokens_in": total.tokens_in,
        "tokens_out": total.tokens_out,
        "cost": total.cost,
        "active_agents": len(overview.agents),
        "idle_agents": overview.idle,
        "workers": len(overview.workers),
        "workers_alive": overview.workers_alive,
        "caches": len(overview.caches),
        "hit_rate": hit_rate(overview),
        "pools": len(overview.pools),
        "load": load,
        "capacity": capacity,
        "waiters": _waiters(overview),
        "firing": len(overview.firing),
        "problems": [each.plain for each in overview.problems],
    }
