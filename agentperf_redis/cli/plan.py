"""The resources that a planned load needs: memory, server time, network, and the number of nodes and of shards.

This module only calculates. `plan_costs` measures the costs of single operations, `doctor_plan` prints the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from agentperf_redis.balancer.commands.pool import MAX_SHARDS
from agentperf_redis.cache.maintenance import REPORT_AFTER_S
from agentperf_redis.cache.model import MIN_SHARD_ENTRIES
from agentperf_redis.cache.process.access_buffer import MAX_READS
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.keys import METRICS_SHARDS
from agentperf_redis.metrics.retention import Retention, memory_forecast

MAX_VALUE_BYTES = 1_000_000
MAX_CORE_SHARE = 0.5
"""Planned share of a core for a node's server. The rest is a reserve for peaks, and for the load of a lost node."""
MAX_MEMORY_SHARE = 0.75
"""Planned share of a node's memory. The rest is a reserve for buffers, fragmentation and growth."""
SHARDS_PER_NODE = 4
"""A shard takes at most 1/SHARDS_PER_NODE of a node's budget, so that shards can be spread evenly over the nodes."""
MIN_CLUSTER_NODES = 3
"""A Cluster needs three primaries to decide which of them has failed."""
DEFAULT_NODE_BYTES = 8 * 2**30
"""Memory of a node if neither the plan nor the server's ``maxmemory`` says how much it has."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]{1,3})?|\.[0-9]+([eE]\+?[0-9]{1,3})?")
_LIMITS: Mapping[str, tuple[float, float]] = {
    "agents": (0, 2000),
    "rps": (0, 1e7),
    "entries": (0, 1e10),
    "value": (1, MAX_VALUE_BYTES),
    "reads": (0, 1e8),
    "hits": (0, 1),
    "instances": (0, 1e7),
    "acquires": (0, 1e7),
    "held": (0.001, 86_400),
    "processes": (1, 1e6),
    "memory": (2**20, 1e15),
}
"""Smallest and largest value of each key of a plan."""
_FRACTIONS = {"rps", "reads", "hits", "acquires", "held"}
"""Keys whose values may have a fraction."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned load. Rates are those of all processes together.

    Attributes:
        agents: number of agents whose metrics are recorded. A namespace has separate counts for at most about 2,000
            agents.
        rps: executions per second of all agents together; each request is one execution.
        entries: entries of the cache.
        value: size of a cached value, bytes.
        reads: reads of the cache per second that reach the server; None for one read for each execution.
        hits: share of the reads that find a value. Each read that finds no value is followed by a put.
        instances: instances of the pool.
        acquires: leases acquired, and released, per second.
        held: seconds for which a lease is held.
        processes: number of worker processes.
        memory: memory of a node, bytes; None for that of the connected server.
    """

    agents: int = 0
    rps: float = 0.0
    entries: int = 0
    value: int = 500
    reads: float | None = None
    hits: float = 0.8
    instances: int = 0
    acquires: float = 0.0
    held: float = 1.0
    processes: int = 16
    memory: int | None = None

    @property
    def reads_per_second(self) -> float:
        """Reads of the cache per second."""
        if not self.entries:
            return 0.0
        return self.rps if self.reads is None else self.reads

    @property
    def puts_per_second(self) -> float:
        """Puts into the cache per second."""
        return self.reads_per_second * (1 - self.hits)


def parsed_plan(text: str) -> Plan:
    """Read a plan such as ``agents=1000,rps=50,entries=1e6``.

    Raises:
        InvalidArgument: a key is unknown or repeated, its value is not allowed, or another key that it needs is
            missing. Also raised if the plan has no agents, no entries and no instances. The error says what is allowed.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in _LIMITS or not equals:
            raise InvalidArgument("--plan", part.strip(), f"<key>=<number>, with the keys {', '.join(_LIMITS)}")
        if key in found:
            raise InvalidArgument("--plan", text, f"each key once, and {key} stands in it twice")
        found[key] = _number(key, value)
    if "acquires" in found and not found.get("instances"):
        raise InvalidArgument("acquires", found["acquires"], "only together with instances, of at least 1")
    if "reads" in found and not found.get("entries"):
        raise InvalidArgument("reads", found["reads"], "only together with entries, of at least 1")
    if found.get("rps") and not found.get("agents"):
        raise InvalidArgument("rps", found["rps"], "only together with agents, of at least 1")
    if not any(found.get(key) for key in ("agents", "entries", "instances")):
        raise InvalidArgument("--plan", text, "a plan with agents, entries or instances, of at least 1")
    return Plan(**{key: value if key in _FRACTIONS else int(value) for key, value in found.items()})  # type: ignore[arg-type]  # keys are fields of Plan


def _number(key: str, text: str) -> float:
    lowest, highest = _LIMITS[key]
    whole = key not in _FRACTIONS
    allowed = f"a {'whole ' if whole else ''}number from {lowest:g} to {highest:g}, such as 500 or 2e3"
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not lowest <= number <= highest or (whole and number != int(number)):
        raise InvalidArgument(key, text, allowed)
    return number


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one operation, or of all operations in one second.

    Attributes:
        cpu: processor time of the server, s.
        received: bytes that the server receives.
        sent: bytes that the server sends.
    """

    cpu: float = 0.0
    received: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.received + other.received, self.sent + other.sent)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.cpu * factor, self.received * factor, self.sent * factor)

    def above(self, other: Cost, parts: int) -> Cost:
        """Return the cost of each of `parts` additional parts: (this cost - `other`) / `parts`, at least 0."""
        return Cost(
            max(0.0, self.cpu - other.cpu) / parts,
            max(0.0, self.received - other.received) / parts,
            max(0.0, self.sent - other.sent) / parts,
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured costs of single operations.

    Attributes:
        flush: a flush of one execution of one agent.
        agent: each further agent in a flush, with one execution.
        execution: each further execution of an agent in a flush.
        read: a read of a cache that finds a value.
        report: a report of one read, from which the server learns how recently entries were used.
        reported: each further read in a report.
        put: a put into a full cache, which evicts an entry.
        acquire: an acquire.
        release: a release.
        entry_bytes: memory of an entry, its value included.
        instance_bytes: memory of an instance.
        lease_bytes: memory of a lease.
    """

    flush: Cost
    agent: Cost
    execution: Cost
    read: Cost
    report: Cost
    reported: Cost
    put: Cost
    acquire: Cost
    release: Cost
    entry_bytes: float
    instance_bytes: float
    lease_bytes: float


@dataclass(frozen=True, slots=True)
class Need:
    """What one service needs.

    Attributes:
        memory: bytes.
        load: the cost per second: `cpu` is a share of a core, `received` and `sent` are bytes per second.
        shards: number of shards among which the service should be divided. Metrics always have 16.
    """

    memory: float
    load: Cost
    shards: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan needs.

    Attributes:
        metrics: the metrics of the agents.
        cache: the cache.
        pool: the pool.
        node_bytes: memory of a node.
        nodes: number of primaries: one for a single server, at least three for a Cluster.
        notes: limits that the plan exceeds, as sentences.
    """

    metrics: Need
    cache: Need
    pool: Need
    node_bytes: int
    nodes: int
    notes: tuple[str, ...] = ()

    @property
    def memory(self) -> float:
        """Memory of all services, bytes."""
        return self.metrics.memory + self.cache.memory + self.pool.memory

    @property
    def load(self) -> Cost:
        """The cost per second of all services together."""
        return self.metrics.load + self.cache.load + self.pool.load


def forecast(plan: Plan, costs: Costs, node_bytes: int, retention: Retention) -> Forecast:
    """Calculate what a plan needs.

    Args:
        plan: the plan.
        costs: the costs of single operations.
        node_bytes: memory of a node; `plan.memory` has precedence.
        retention: the retention of the metrics.
    """
    node_bytes = plan.memory or node_bytes
    metrics = _metrics(plan, costs, retention)
    cache = (plan.entries * costs.entry_bytes, _cache_load(plan, costs))
    leases = plan.acquires * plan.held
    pool = (
        plan.instances * costs.instance_bytes + leases * costs.lease_bytes,
        (costs.acquire + costs.release) * plan.acquires,
    )
    services = {"metrics": metrics, "cache": cache, "pool": pool}
    used = _nodes(sum(memory for memory, _ in services.values()), metrics[1] + cache[1] + pool[1], node_bytes)
    nodes = 1 if used <= 1 else max(MIN_CLUSTER_NODES, math.ceil(used))
    shards = {
        name: 1 if nodes == 1 else _shards(SHARDS_PER_NODE * _nodes(*service, node_bytes))
        for name, service in services.items()
    }
    return Forecast(
        Need(*metrics, METRICS_SHARDS),
        Need(*cache, min(MAX_SHARDS, shards["cache"])),
        Need(*pool, min(MAX_SHARDS, shards["pool"])),
        node_bytes,
        nodes,
        tuple(_notes(plan, shards)),
    )


def _nodes(memory: float, load: Cost, node_bytes: int) -> float:
    """Return how many nodes a load needs if each node is filled to the planned share of its memory and of its core."""
    return max(memory / (MAX_MEMORY_SHARE * node_bytes), load.cpu / MAX_CORE_SHARE)


def _shards(parts: float) -> int:
    return 1 << max(0, math.ceil(math.log2(parts))) if parts > 1 else 1


def _notes(plan: Plan, shards: Mapping[str, int]) -> list[str]:
    notes = [
        f"the {name} would need {shards[name]} shards, and {MAX_SHARDS} is the maximum: use several {name}s"
        for name in ("cache", "pool")
        if shards[name] > MAX_SHARDS
    ]
    if shards["metrics"] > METRICS_SHARDS:
        notes.append(
            f"the metrics have {METRICS_SHARDS} shards, each of which would fill more than a quarter of a node: use "
            "several namespaces"
        )
    if shards["cache"] > 1 and plan.entries < MIN_SHARD_ENTRIES * shards["cache"]:
        notes.append(f"a shard of a cache needs at least {MIN_SHARD_ENTRIES} entries: use several caches")
    return notes


def _metrics(plan: Plan, costs: Costs, retention: Retention) -> tuple[float, Cost]:
    if not plan.agents or not plan.rps:
        return 0.0, Cost()
    memory = memory_forecast(retention, agents=plan.agents, per_second=max(1e-6, plan.rps / plan.agents)).total
    # Each process flushes once a second. Executions are assumed to spread at random over processes and agents.
    agents = _hit(plan.rps, plan.processes * plan.agents)
    flushes = _hit(plan.rps, plan.processes * min(METRICS_SHARDS, plan.agents))
    load = costs.flush * flushes + costs.agent * (agents - flushes) + costs.execution * (plan.rps - agents)
    return memory, load


def _cache_load(plan: Plan, costs: Costs) -> Cost:
    hits = plan.reads_per_second * plan.hits
    reports = _hit(hits * REPORT_AFTER_S, plan.processes) / REPORT_AFTER_S
    reports = max(reports, hits / MAX_READS)
    return (
        costs.read * plan.reads_per_second
        + costs.put * plan.puts_per_second
        + costs.report * reports
        + costs.reported * (hits - reports)
    )


def _hit(events: float, places: int) -> float:
    """Return how many of `places` are hit at least once, on average, by events that are spread at random."""
    return min(events, -places * math.expm1(-events / places))


def plan_in_words(plan: Plan) -> list[str]:
    """Return what is planned, one phrase for each service."""
    words = []
    if plan.agents:
        words.append(f"{plan.agents:,} agents with {plan.rps:,g} executions a second in all")
    if plan.entries:
        words.append(
            f"{plan.entries:,} entries of {plan.value:,} bytes with {plan.reads_per_second:,g} reads and "
            f"{plan.puts_per_second:,g} puts a second"
        )
    if plan.instances:
        words.append(
            f"{plan.instances:,} instances with {plan.acquires:,g} leases a second, each held for {plan.held:g} s"
        )
    return [*words, f"{plan.processes:,} processes"]


def plan_as_dict(plan: Plan) -> dict[str, float | int | None]:
    """Return the keys and values of a plan, defaults included."""
    return {each.name: getattr(plan, each.name) for each in fields(plan)} | {"reads": plan.reads_per_second}
