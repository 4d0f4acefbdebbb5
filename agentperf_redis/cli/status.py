"""`agentperf status`: all three services at a glance."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.cli.console import Exit, Target, counted, new_table, out, print_json, seconds_cell
from agentperf_redis.metrics.model import PerformanceMetrics, SystemSummary

_MIB = 2**20


def status(target: Target, *, as_json: bool) -> Exit:
    """Print agents, caches and pools of a namespace."""
    with target.connect() as perf:
        agents = list(perf.metrics.snapshots().values())
        summary = perf.metrics.summary()
        caches = perf.caches()
        pools = perf.balancer().status()
        address, namespace = perf.backend.address.masked, perf.backend.namespace
    if as_json:
        print_json(
            "status",
            {
                "server": address,
                "namespace": namespace,
                "summary": _plain_summary(summary),
                "agents": [plain_agent(each) for each in agents],
                "caches": [_plain_cache(each) for each in caches],
                "pools": {each.agent_type: each.render() for each in pools},
            },
        )
        return Exit.OK
    out.print(f"Server {address}, namespace {namespace}")
    if not (agents or caches or pools):
        out.print("Nothing here yet: no agent is recorded, no cache is in use, no instance is registered.")
        return Exit.OK
    out.print(
        f"{counted(summary.total_tasks, 'task')} of {counted(summary.active_agents, 'agent')} "
        f"in {summary.uptime:.1f} s, {summary.success_rate:.1%} succeeded, {summary.throughput:.2f} tasks/s",
    )
    for table in (agents_table(agents), caches_table(caches), pools_table(pools)):
        if table.row_count:
            out.print()
            out.print(table)
    return Exit.OK


def agents_table(agents: list[PerformanceMetrics]) -> Table:
    """Return one row per agent; ≈ marks estimated percentiles."""
    table = new_table("agents", ["agent"], ["tasks", "success", "avg s", "p50 s", "p95 s", "p99 s", "top error"])
    for each in sorted(agents, key=lambda agent: -agent.task_count):
        about = "" if each.exact else "≈"
        errors = sorted(each.error_types.items(), key=lambda item: -item[1])
        table.add_row(
            each.agent_name,
            str(each.task_count),
            f"{each.success_rate:.1%}",
            seconds_cell(each.avg_execution_time),
            *(f"{about}{seconds_cell(value)}" for value in (each.p50_execution_time, each.p95_execution_time)),
            f"{about}{seconds_cell(each.p99_execution_time)}",
            f"{errors[0][0]} × {errors[0][1]}" if errors else "",
        )
    return table


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
            )
    return table


def _plain_summary(summary: SystemSummary) -> dict[str, Any]:
    return {
        "uptime_s": summary.uptime,
        "tasks": summary.total_tasks,
        "successes": summary.total_successes,
        "failures": summary.total_failures,
        "throughput_per_s": summary.throughput,
        "active_agents": summary.active_agents,
    }


def plain_agent(agent: PerformanceMetrics) -> dict[str, Any]:
    """Return the fields that every --json output has for an agent."""
    return {
        "agent": agent.agent_name,
        "tasks": agent.task_count,
        "success_rate": agent.success_rate,
        "avg_s": agent.avg_execution_time,
        "p50_s": agent.p50_execution_time,
        "p95_s": agent.p95_execution_time,
        "p99_s": agent.p99_execution_time,
        "percentiles_exact": agent.exact,
        "errors": dict(agent.error_types),
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
