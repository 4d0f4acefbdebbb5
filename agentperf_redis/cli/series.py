"""The command `agentperf series`: an agent, a cache or a pool over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cache.operator import SERVICES, keys_of
from agentperf_redis.cli.console import (
    Exit,
    NotFound,
    Target,
    WrongUsage,
    new_table,
    out,
    print_json,
    printable,
    quoted,
    seconds_cell,
)
from agentperf_redis.cli.times import asked_end
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.model import Interval
from agentperf_redis.metrics.series import SeriesRow
from agentperf_redis.windows import asked_steps

_BAR_CELLS = 10
_MIB = 2**20
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NO_DATA = "–"
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of numbers. If the terminal is too narrow, columns that are not `needed` are left out."""

    head: str
    cell: Callable[[Any], str]
    needed: bool = False


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows to print.

    Attributes:
        kind: "agent", "cache" or "pool".
        name: name of the agent, cache or pool.
        rows: the rows.
        columns: columns of the table.
        bar: name of the figure that the bars show, and a function that returns the figure of a row.
        plain: returns the JSON fields of a row, except its interval.
        fields: further fields of the JSON document.
    """

    kind: str
    name: str
    rows: Sequence[Any]
    columns: tuple[_Column, ...]
    bar: tuple[str, Callable[[Any], float]]
    plain: Callable[[Any], dict[str, Any]]
    fields: dict[str, Any]


def series(
    target: Target,
    agent: str | None,
    cache: str | None,
    pool: str | None,
    window: str,
    step: str,
    as_of: str | None,
    *,
    as_json: bool,
) -> Exit:
    """Print one line a step."""
    if sum(each is not None for each in (agent, cache, pool)) != 1:
        raise WrongUsage("give an AGENT, --cache NAME or --pool TYPE, and only one of them")
    end = asked_end(as_of, window)
    span = (_parsed(window), _parsed(step), end)
    with target.connect() as perf:
        if agent is not None:
            found = _of_agent(perf, agent, *span)
        elif cache is not None:
            found = _of_cache(perf, cache, *span)
        else:
            found = _of_pool(perf, pool or "", *span)
    if as_json:
        rows = [{"start": each.interval.start, "end": each.interval.end, **found.plain(each)} for each in found.rows]
        head = {found.kind: found.name, "window": window, "step": step, "as_of": as_of}
        print_json("series", {**head, **found.fields, "rows": rows})
    else:
        _print(found, window, step)
    return Exit.OK


def _parsed(length: str) -> str | int:
    """Convert a length of time for the API: a text that is a whole number becomes an int of seconds."""
    return int(length) if length.isascii() and length.isdigit() else length


def _of_agent(perf: AgentPerf, name: str, window: str | int, step: str | int, as_of: datetime | float | None) -> _Rows:
    rows = perf.metrics.series(name, window=window, step=step, as_of=as_of)
    if not any(row.tasks or row.tokens for row in rows):
        known = perf.backend.run(flows.agent_names(perf.metrics._flusher))  # noqa: SLF001  reads only the names
        if name not in known:
            raise NotFound(f"agent {quoted(name)}: no records")
    return _Rows(
        "agent",
        name,
        rows,
        (
            _Column("tasks", lambda row: str(row.tasks), needed=True),
            _Column("errors", lambda row: str(row.errors), needed=True),
            _Column("p50 s", lambda row: _timed(row, row.p50, "≈")),
            _Column("p95 s", lambda row: _timed(row, row.p95, "≈"), needed=True),
            _Column("p99 s", lambda row: _timed(row, row.p99, "≈")),
            _Column("max s", lambda row: _timed(row, row.max)),
            _Column("tokens", lambda row: str(row.tokens)),
            _Column("cost", lambda row: f"{row.cost:.6g}"),
        ),
        ("tasks", lambda row: row.tasks),
        _plain_row,
        {"error_bound": max((row.error_bound for row in rows), default=0.0)},
    )


def _of_cache(perf: AgentPerf, name: str, window: str | int, step: str | int, as_of: datetime | float | None) -> _Rows:
    asked_steps(window, step, as_of)  # a wrong option is reported before a missing cache
    services = [service for service in SERVICES if name in perf.backend.run(perf.backend.entered(service))]
    if not services:
        raise NotFound(f"cache {quoted(name)}")
    if len(services) > 1:
        raise WrongUsage(f"{quoted(name)} is both an LRUCache and a TieredCache: rename one of them")
    shards = perf.backend.run(keys_of(perf.backend, services[0], name))
    rows = perf.backend.run(cache_history.series(shards, window, step, as_of))
    return _Rows(
        "cache",
        name,
        rows,
        (
            _Column("hits", lambda row: _known(row.hits), needed=True),
            _Column("misses", lambda row: _known(row.misses), needed=True),
            _Column("hit rate", lambda row: _NO_DATA if row.hit_rate is None else f"{row.hit_rate:.1%}", needed=True),
            _Column("entries", lambda row: _known(row.size)),
            _Column("MiB", lambda row: _NO_DATA if row.bytes is None else f"{row.bytes / _MIB:.2f}"),
            _Column("evicted", lambda row: _known(row.evictions)),
        ),
        ("hit rate", lambda row: row.hit_rate or 0.0),
        lambda row: {
            "hits": row.hits,
            "misses": row.misses,
            "hit_rate": row.hit_rate,
            "entries": row.size,
            "bytes": row.bytes,
            "evictions": row.evictions,
        },
        {},
    )


def _of_pool(perf: AgentPerf, name: str, window: str | int, step: str | int, as_of: datetime | float | None) -> _Rows:
    rows = perf.balancer().series(name, window=window, step=step, as_of=as_of)
    if name not in perf.backend.run(perf.backend.entered("lb")):
        raise NotFound(f"pool {quoted(name)}")
    return _Rows(
        "pool",
        name,
        rows,
        (
            _Column("load", lambda row: _NO_DATA if row.load is None else f"{row.load:.1f}", needed=True),
            _Column("waiters", lambda row: _known(row.waiters), needed=True),
            _Column("unhealthy", lambda row: _known(row.unhealthy), needed=True),
        ),
        ("load", lambda row: row.load or 0.0),
        lambda row: {"load": row.load, "waiters": row.waiters, "unhealthy": row.unhealthy},
        {},
    )


def _known(number: int | None) -> str:
    return _NO_DATA if number is None else str(number)


def _timed(row: SeriesRow, seconds: float, about: str = "") -> str:
    return about + seconds_cell(seconds) if row.tasks else _NO_DATA


def _plain_row(row: SeriesRow) -> dict[str, Any]:
    return {
        "tasks": row.tasks,
        "errors": row.errors,
        "cancelled": row.cancelled,
        "failure_rate": row.failure_rate,
        "throughput_per_s": row.throughput,
        "avg_s": row.avg,
        "p50_s": row.p50,
        "p95_s": row.p95,
        "p99_s": row.p99,
        "max_s": row.max,
        "tokens_in": row.tokens_in,
        "tokens_out": row.tokens_out,
        "cost": row.cost,
    }


def _print(found: _Rows, window: str, step: str) -> None:
    """Print a table with as many columns as fit into the terminal. If there is room left, add bars."""
    label, value = found.bar
    times = _times([each.interval for each in found.rows])
    cells = [(column, [column.cell(each) for each in found.rows]) for column in found.columns]
    left = out.width - max(map(len, ("start", *times)))
    shown = {column.head: len(column.head) for column in found.columns if column.needed}
    left -= sum(2 + max(map(len, (column.head, *texts))) for column, texts in cells if column.needed)
    bars = left >= 2 + max(_BAR_CELLS, len(label))
    left -= 2 + max(_BAR_CELLS, len(label)) if bars else 0
    for column, texts in cells:
        width = 2 + max(map(len, (column.head, *texts)))
        if not column.needed and width <= left:
            shown[column.head] = width
            left -= width
    title = f"{printable(found.name)}, {window} by {step}"
    kept = [(column, texts) for column, texts in cells if column.head in shown]
    table = new_table(title, ["start"], [column.head for column, _ in kept])
    table.columns[0].no_wrap = True
    if bars:
        table.add_column(label, no_wrap=True)
    largest = max((value(each) for each in found.rows), default=0.0)
    for at, each in enumerate(found.rows):
        bar = [_bar(value(each), largest)] if bars else []
        table.add_row(times[at], *(texts[at] for _, texts in kept), *bar)
    table.padding = (0, 2, 0, 0)
    out.print(table)


def _times(intervals: Sequence[Interval]) -> list[str]:
    """Return the local start of each step: with the date if the steps span more than a day, with seconds if needed."""
    starts = [datetime.fromtimestamp(each.start).astimezone() for each in intervals]
    long = len(intervals) > 1 and intervals[-1].start - intervals[0].start >= _DAY_S
    exact = any(start.second for start in starts)
    form = ("%m-%d " if long else "") + ("%H:%M:%S" if exact else "%H:%M")
    return [start.strftime(form) for start in starts]


def _bar(value: float, largest: float) -> str:
    """Return a bar of up to ten cells, rounded to an eighth of a cell. Any value above zero is visible."""
    if value <= 0:
        return ""
    eighths = max(1, round(value / largest * _BAR_CELLS * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
