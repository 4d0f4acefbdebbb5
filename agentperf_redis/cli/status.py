"""`agentperf status`: all three services at a glance, once or repeatedly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.model import InstanceState, PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.cli.agents import agents_table, by_failures, last_seen_cell, plain_agent, plain_time
from agentperf_redis.cli.console import (
    Exit,
    Target,
    counted,
    err,
    new_table,
    out,
    print_json,
    print_json_line,
    printable,
)
from agentperf_redis.cli.models import models_of, models_table, plain_model
from agentperf_redis.cli.times import asked_end, parsed_window, window_text
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.metrics.model import PerformanceMetrics, SystemSummary, system_summary
from agentperf_redis.views.problems import RECOVERING, Problem, problems

_MIB = 2**20
_SHOWN_IDLE = 5
_EMPTY = "Nothing here yet: no agent is recorded, no cache is in use, no instance is registered."
_COLOURS = {"bad": "red", "note": "yellow"}


@dataclass(frozen=True, slots=True)
class Overview:
    """One reading of a namespace.

    Attributes:
        server: address of the server, password masked.
        namespace: the namespace.
        window: the window as the user gave it.
        as_of: the end of the window as the user gave it.
        agents: the agents with records in the window, those with the largest share of failures first.
        idle: the agents without records in the window, the most recently seen first; empty without a window and for a
            past window.
        caches: the caches; empty for a past window, since this command reads no history of caches.
        pools: the pools; empty for a past window.
    """

    server: str
    namespace: str
    window: str | None
    as_of: str | None
    agents: list[PerformanceMetrics]
    idle: list[PerformanceMetrics]
    caches: list[CacheStats]
    pools: list[PoolStatus]

    @property
    def summary(self) -> SystemSummary:
        """The totals of all agents."""
        return system_summary(self.agents)

    @property
    def problems(self) -> list[Problem]:
        """The problems, the bad ones first."""
        return problems(self.agents, self.caches, self.pools)

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return not (self.agents or self.idle or self.caches or self.pools)


def status(target: Target, window: str | None, as_of: str | None, every: float | None) -> Exit:
    """Print agents, caches and pools of a namespace. If `every` is given, repeat this every `every` seconds."""
    end = asked_end(as_of, window)
    with target.connect() as perf:
        first = _read(perf, window, as_of, end)
        if every is not None:
            _watch(target, first, lambda: _read(perf, window, as_of, end), every)
    if target.as_json:
        print_json("status", _plain(first))
        return Exit.OK
    for part in _rendered(first):
        out.print(part)
    if first.empty:
        target.hint()
    return Exit.OK


def _read(perf: AgentPerf, window: str | None, as_of: str | None, end: datetime | float | None) -> Overview:
    agents = perf.metrics.snapshots(window=parsed_window(window), as_of=end)
    active = [each for each in agents.values() if each.task_count or each.llm_calls or each.tool_calls]
    idle: list[PerformanceMetrics] = []
    if window is not None and as_of is None:
        known = perf.metrics.snapshots(percentiles=False)
        names = {each.agent_name for each in active}
        seen = [(each.last_execution, each) for each in known.values() if each.agent_name not in names]
        dated = [(last, each) for last, each in seen if last is not None]
        idle = [each for _, each in sorted(dated, key=lambda pair: pair[0], reverse=True)]
    return Overview(
        perf.backend.address.masked,
        perf.backend.namespace,
        window,
        as_of,
        by_failures(active),
        idle,
        perf.caches() if as_of is None else [],
        perf.balancer().status() if as_of is None else [],
    )


def _watch(target: Target, first: Overview, read: Callable[[], Overview], every: float) -> None:
    """Show one reading after another. An outage of the server is reported once, and the loop goes on."""
    with _display(target) as show:
        show(first, "")
        fault = ""
        while True:
            time.sleep(every)
            try:
                overview = read()
            except BackendUnavailable as error:
                if not fault:
                    show(None, str(error))
                fault = str(error)
            else:
                fault = ""
                show(overview, "")


@contextlib.contextmanager
def _display(target: Target) -> Iterator[Callable[[Overview | None, str], None]]:
    """Yield a function that shows a reading or a fault. A terminal shows only the latest; a file or pipe gets all."""
    if target.as_json or not out.is_terminal:

        def append(overview: Overview | None, fault: str) -> None:
            if overview is None:
                err.print(f"agentperf: {fault}; trying again", style="red")
            elif target.as_json:
                print_json_line("status", _plain(overview))
            else:
                out.print(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}")
                for part in (*_rendered(overview), ""):
                    out.print(part)
                out.file.flush()

        yield append
        return
    with Live(console=out, screen=True, auto_refresh=False) as live:

        def replace(overview: Overview | None, fault: str) -> None:
            at = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}, ends with Ctrl-C"
            if overview is None:
                live.update(Group(Text(at), Text(f"{fault}; trying again", style="red")), refresh=True)
            else:
                live.update(Group(Text(at), *_rendered(overview)), refresh=True)

        yield replace


def _rendered(overview: Overview) -> Iterator[RenderableType]:
    yield Text(f"Server {overview.server}, namespace {overview.namespace}")
    if overview.empty:
        yield Text(_EMPTY)
        return
    summary = overview.summary
    within = f"{summary.uptime:.1f} s" if overview.window is None else window_text(overview.window, overview.as_of)
    yield Text(
        f"{counted(summary.total_tasks, 'task')} of {counted(summary.active_agents, 'agent')} "
        f"in {within}, {summary.success_rate:.1%} succeeded, {summary.throughput:.2f} tasks/s, "
        f"{summary.total_failures / summary.uptime if summary.uptime else 0:.2f} failures/s"
    )
    if overview.problems:
        yield Text("\nproblems", style="bold")
        for each in overview.problems:
            line = f"{each.level:<4}  {each.subject} {printable(each.name)}: {printable(each.text)}"
            yield Text(line, style=_COLOURS[each.level], overflow="fold")
    past = overview.as_of is not None
    agents = agents_table(overview.agents, rates=overview.window is not None, past=past)
    models = models_table(models_of(overview.agents))
    for table in (agents, models, caches_table(overview.caches), pools_table(overview.pools)):
        if table.row_count:
            yield Text("")
            yield table
    if overview.idle:
        names = [f"{printable(each.agent_name)} ({last_seen_cell(each)})" for each in overview.idle[:_SHOWN_IDLE]]
        more = ["..."] if len(overview.idle) > _SHOWN_IDLE else []
        yield Text(f"\nIdle in {window_text(overview.window)}: {', '.join([*names, *more])}")
    if past:
        yield Text("\nCaches and pools keep no history here, so they are not shown.")


def _plain(overview: Overview) -> dict[str, Any]:
    return {
        "server": overview.server,
        "namespace": overview.namespace,
        "window": overview.window,
        "as_of": overview.as_of,
        "problems": [each.plain for each in overview.problems],
        "summary": _plain_summary(overview.summary),
        "agents": [plain_agent(each) for each in overview.agents],
        "models": {model: plain_model(use) for model, use in models_of(overview.agents).items()},
        "idle": [{"agent": each.agent_name, "last_seen": plain_time(each.last_execution)} for each in overview.idle],
        "caches": [_plain_cache(each) for each in overview.caches],
        "pools": {each.agent_type: each.render() for each in overview.pools},
    }


def caches_table(caches: list[CacheStats]) -> Table:
    """Return one row per cache."""
    table = new_table(
        "caches", ["cache"], ["entries", "limit", "MiB", "hits", "misses", "hit rate", "evicted", "seconds saved"]
    )
    for each in caches:
        table.add_row(
            each.name,
            str(each.size),
            str(each.max_size),
            f"{each.bytes / _MIB:.2f}",
            str(each.hits),
            str(each.misses),
            f"{each.hit_rate:.1%}",
            str(each.evictions),
            f"{each.seconds_saved:.1f}",
            style="yellow" if each.corrupt else None,
        )
    return table


def pools_table(pools: list[PoolStatus]) -> Table:
    """Return one row per instance."""
    table = new_table("pools", ["pool", "instance", "state"], ["load", "limit", "peak", "served", "failed", "ms"])
    for pool in pools:
        for each in pool.instances:
            instance = each.instance
            table.add_row(
                f"{pool.agent_type} ({pool.strategy.value})",
                instance.id,
                each.state.value,
                f"{instance.current_load}/{instance.max_capacity}",
                str(each.limit),
                str(each.peak_load),
                str(each.served),
                str(each.failed),
                f"{instance.response_time_ms:.1f}",
                style=_style(each.state),
            )
    return table


def _style(state: InstanceState) -> str | None:
    if state is InstanceState.UP:
        return None
    return "yellow" if state in RECOVERING or state is InstanceState.DRAINING else "red"


def _plain_summary(summary: SystemSummary) -> dict[str, Any]:
    return {
        "uptime_s": summary.uptime,
        "tasks": summary.total_tasks,
        "successes": summary.total_successes,
        "failures": summary.total_failures,
        "cancelled": summary.total_cancelled,
        "throughput_per_s": summary.throughput,
        "active_agents": summary.active_agents,
    }


def _plain_cache(stats: CacheStats) -> dict[str, Any]:
    return {
        "cache": stats.name,
        "entries": stats.size,
        "max_entries": stats.max_size,
        "bytes": stats.bytes,
        "max_bytes": stats.max_bytes,
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rate": stats.hit_rate,
        "evictions": stats.evictions,
        "seconds_saved": stats.seconds_saved,
    }
