"""`agentperf doctor --plan`: what a planned load needs, from the costs measured on the connected server."""

from __future__ import annotations

from typing import Any

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cli.console import Exit, Target, counted, new_table, out, print_json
from agentperf_redis.cli.doctor import parsed_info
from agentperf_redis.cli.plan import (
    DEFAULT_NODE_BYTES,
    MAX_CORE_SHARE,
    MAX_MEMORY_SHARE,
    Cost,
    Costs,
    Forecast,
    Plan,
    forecast,
    parsed_plan,
    plan_as_dict,
    plan_in_words,
)
from agentperf_redis.cli.plan_costs import measured_costs
from agentperf_redis.command import Command
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.metrics import flows
from agentperf_redis.views.reading import flusher_of
from agentperf_redis.views.scanning import primaries
from agentperf_redis.views.text import size_text

_OPERATIONS = {
    "flush": "flush of 1 execution",
    "agent": "further agent in a flush",
    "execution": "further execution",
    "read": "read of a cache, a hit",
    "report": "report of a read",
    "reported": "further read in a report",
    "put": "put that evicts",
    "acquire": "acquire",
    "release": "release",
}
"""Name of an operation in `Costs` -> its name on the screen."""


def doctor_plan(target: Target, text: str, *, as_json: bool) -> Exit:
    """Print what a plan needs."""
    plan = parsed_plan(text)
    with target.connect() as perf:
        costs = measured_costs(perf.backend, plan.value)
        node_bytes = _max_memory(perf) or DEFAULT_NODE_BYTES
        found = forecast(plan, costs, node_bytes, perf.backend.run(flows.retention(flusher_of(perf))))
        address = perf.backend.address.masked
    if as_json:
        print_json("doctor plan", {"server": address, **_plain(plan, costs, found)})
    else:
        _print(address, plan, costs, found)
    return Exit.OK


def _max_memory(perf: AgentPerf) -> int:
    """Return the smallest ``maxmemory`` of the primaries; 0 if none has a limit."""
    limits = []
    for server in primaries(perf.backend):
        text = server.run(Command("INFO", (), ("memory",), parsed_info)).get("maxmemory", "")
        if not text.isdigit():
            raise AgentPerfError("INFO does not report maxmemory")
        limits.append(int(text))
    return min((limit for limit in limits if limit), default=0)


def _print(address: str, plan: Plan, costs: Costs, found: Forecast) -> None:
    out.print(f"Plan: {'; '.join(plan_in_words(plan))}.")
    out.print(f"Costs were measured on {address}, one call at a time. A busy server needs less for a call.\n")
    table = new_table("", ["service"], ["memory", "% of a core", "in /s", "out /s", "shards"])
    for name, need in (("metrics", found.metrics), ("cache", found.cache), ("pool", found.pool)):
        table.add_row(name, *_cells(need.memory, need.load), str(need.shards))
    table.add_row("all", *_cells(found.memory, found.load), "")
    out.print(table)
    shards = f"{counted(found.cache.shards, 'shard')} for the cache, {found.pool.shards} for the pool"
    out.print(
        f"\nIt needs {counted(found.nodes, 'node')}{' of a Cluster' if found.nodes > 1 else ''}, {shards}: at most "
        f"{MAX_CORE_SHARE:.0%} of a core and {MAX_MEMORY_SHARE:.0%} of {size_text(found.node_bytes)} for each node."
    )
    for note in found.notes:
        out.print(f"Note: {note}.")
    out.print()
    table = new_table("measured", ["operation"], ["server us", "bytes in", "bytes out"])
    for name, words in _OPERATIONS.items():
        cost: Cost = getattr(costs, name)
        table.add_row(words, f"{cost.cpu * 1e6:.1f}", f"{cost.received:.0f}", f"{cost.sent:.0f}")
    out.print(table)
    sizes = f"entry {costs.entry_bytes:.0f}, instance {costs.instance_bytes:.0f}, lease {costs.lease_bytes:.0f}"
    out.print(f"Bytes of memory: {sizes}.")


def _cells(memory: float, load: Cost) -> tuple[str, str, str, str]:
    return size_text(memory), f"{100 * load.cpu:.2f}", size_text(load.received), size_text(load.sent)


def _plain(plan: Plan, costs: Costs, found: Forecast) -> dict[str, Any]:
    services = {"metrics": found.metrics, "cache": found.cache, "pool": found.pool}
    return {
        "plan": plan_as_dict(plan),
        "needs": {name: {**_load(need.memory, need.load), "shards": need.shards} for name, need in services.items()},
        "all": _load(found.memory, found.load),
        "nodes": found.nodes,
        "node_bytes": found.node_bytes,
        "notes": list(found.notes),
        "costs": {
            **{name: _cost(getattr(costs, name)) for name in _OPERATIONS},
            "entry_bytes": costs.entry_bytes,
            "instance_bytes": costs.instance_bytes,
            "lease_bytes": costs.lease_bytes,
        },
    }


def _load(memory: float, load: Cost) -> dict[str, Any]:
    return {
        "memory_bytes": round(memory),
        "core_share": load.cpu,
        "received_bytes_per_s": load.received,
        "sent_bytes_per_s": load.sent,
    }


def _cost(cost: Cost) -> dict[str, float]:
    return {"server_us": cost.cpu * 1e6, "received_bytes": cost.received, "sent_bytes": cost.sent}
