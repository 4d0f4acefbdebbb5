"""The exported metrics in one table, and their values. The exporters differ only in the format.

Names and units follow Prometheus' conventions. A counter's name has no suffix here; Prometheus appends ``_total``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from agentperf_redis.balancer.model import InstanceState, PoolStatus
from agentperf_redis.cache.model import TIERS, CacheStats
from agentperf_redis.export.reading import Reading
from agentperf_redis.metrics.counters import Counters


class FamilyKind(Enum):
    """The type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A metric and its labels. Families are compared by identity, because they are keys in the inner loop of a scrape.

    Attributes:
        name: its name, without ``_total``.
        kind: its type.
        labels: names of its labels.
        meaning: its meaning, one sentence.
        unit: ``seconds`` or ``bytes``, the suffix of the name; otherwise empty.
    """

    name: str
    kind: FamilyKind
    labels: tuple[str, ...]
    meaning: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Durations:
    """The durations of an agent's executions, as whole numbers.

    Attributes:
        sum_us: sum of the durations, us.
        zeros: number of durations of 0 us.
        buckets: number of the other durations, by bucket; see `agentperf_redis.metrics.histogram`.
        min_us: shortest duration, us.
        max_us: longest duration, us.
    """

    sum_us: int
    zeros: int
    buckets: Mapping[int, int]
    min_us: int
    max_us: int

    @property
    def count(self) -> int:
        """Number of executions."""
        return self.zeros + sum(self.buckets.values())


Value = int | float | Durations
Samples = list[tuple[tuple[str, ...], Value]]
"""The values of a family, each together with its label values."""


def _counter(name: str, labels: str, meaning: str, unit: str = "") -> Family:
    return Family(f"agentperf_{name}", FamilyKind.COUNTER, tuple(labels.split()), meaning, unit)


def _gauge(name: str, labels: str, meaning: str, unit: str = "") -> Family:
    return Family(f"agentperf_{name}", FamilyKind.GAUGE, tuple(labels.split()), meaning, unit)


UP = _gauge("up", "", "1 if the exporter could read the server, else 0.")
INFO = _gauge("exporter_info", "namespace version", "Always 1; namespace and version of the exporter.")
PART_READ = _gauge("exporter_part_read", "part", "1 if the part (agents, caches, pools) could be read, else 0.")
PART_SECONDS = _gauge("exporter_part_read_seconds", "part", "Duration of the read of the part.", "seconds")

EXECUTIONS = _counter("agent_executions", "agent outcome", "Executions by outcome: success, failure or cancelled.")
DURATIONS = Family(
    "agentperf_agent_execution_seconds",
    FamilyKind.HISTOGRAM,
    ("agent",),
    "Durations of executions, including failed and cancelled ones.",
    "seconds",
)
ERRORS = _counter("agent_errors", "agent error_type", "Failed executions by error type, if the type is known.")
LLM_CALLS = _counter("agent_llm_calls", "agent model", "Calls of language models; the model is empty if unknown.")
TOOL_CALLS = _counter("agent_tool_calls", "agent", "Calls of tools.")
TOKENS = _counter(
    "agent_tokens", "agent model type", "Tokens sent to models (type input) and received from them (type output)."
)
TOKEN_PARTS = _counter(
    "agent_token_parts",
    "agent model type",
    "Parts of the tokens: cache_read and cache_write are parts of input, reasoning is a part of output.",
)
COST = _counter("agent_cost", "agent model", "Cost of models, in the unit of the records.")
LAST_EXECUTION = _gauge(
    "agent_last_execution_timestamp_seconds", "agent", "End of the last execution, s since 1970.", "seconds"
)

CACHE_REQUESTS = _counter("cache_requests", "cache kind result", "Reads of the cache by result: hit or miss.")
CACHE_TIER_HITS = _counter("cache_tier_hits", "cache kind tier", "Hits by tier of a tiered cache.")
CACHE_EVICTIONS = _counter("cache_evictions", "cache kind", "Entries removed because the cache was full.")
CACHE_EXPIRATIONS = _counter("cache_expirations", "cache kind", "Expired entries removed.")
CACHE_CORRUPT = _counter("cache_corrupt_reads", "cache kind", "Reads whose bytes were not a valid value.")
CACHE_SAVED = _counter("cache_saved_seconds", "cache kind", "Computing time saved by hits.", "seconds")
CACHE_ENTRIES = _gauge("cache_entries", "cache kind tier", "Entries by tier; an LRU cache has only the tier cold.")
CACHE_MAX_ENTRIES = _gauge("cache_max_entries", "cache kind tier", "Capacity by tier, in entries.")
CACHE_BYTES = _gauge("cache_bytes", "cache kind", "Size of all keys and values.", "bytes")
CACHE_MAX_BYTES = _gauge("cache_max_bytes", "cache kind", "Capacity in bytes, if it is limited.", "bytes")

POOL_INSTANCES = _gauge("pool_instances", "pool state", "Instances by state.")
POOL_HEALTHY = _gauge("pool_healthy_instances", "pool", "Instances that are healthy.")
POOL_LOAD = _gauge("pool_load", "pool", "Leases on all instances.")
POOL_CAPACITY = _gauge("pool_capacity", "pool", "Sum of the capacities of all instances.")
POOL_WAITERS = _gauge("pool_waiters", "pool", "Callers in the queue.")
POOL_OVERDUE = _gauge("pool_overdue_leases", "pool", "Leases that have expired and are not ended yet.")
POOL_PANIC = _gauge("pool_panic", "pool", "1 while unhealthy instances get work, because too many are unhealthy.")
POOL_GRANTED = _counter("pool_leases_granted", "pool", "Leases granted.")
INSTANCE_LOAD = _gauge("instance_load", "pool agent_instance", "Leases on the instance.")
INSTANCE_LIMIT = _gauge(
    "instance_limit", "pool agent_instance", "Maximum number of leases now; 0 while it takes no work."
)
INSTANCE_RELEASES = _counter(
    "instance_releases", "pool agent_instance outcome", "Leases released, by outcome: success or failure."
)
INSTANCE_RESPONSE = _gauge(
    "instance_response_seconds", "pool agent_instance", "Smoothed response time of the instance.", "seconds"
)

STATUS = (UP, INFO, PART_READ, PART_SECONDS)
AGENTS = (EXECUTIONS, DURATIONS, ERRORS, LLM_CALLS, TOOL_CALLS, TOKENS, TOKEN_PARTS, COST, LAST_EXECUTION)
CACHES = (
    *(CACHE_REQUESTS, CACHE_TIER_HITS, CACHE_EVICTIONS, CACHE_EXPIRATIONS, CACHE_CORRUPT, CACHE_SAVED),
    *(CACHE_ENTRIES, CACHE_MAX_ENTRIES, CACHE_BYTES, CACHE_MAX_BYTES),
)
POOLS = (
    *(POOL_INSTANCES, POOL_HEALTHY, POOL_LOAD, POOL_CAPACITY, POOL_WAITERS, POOL_OVERDUE, POOL_PANIC, POOL_GRANTED),
    *(INSTANCE_LOAD, INSTANCE_LIMIT, INSTANCE_RELEASES, INSTANCE_RESPONSE),
)
FAMILIES = (*STATUS, *AGENTS, *CACHES, *POOLS)


def values(reading: Reading) -> Iterator[tuple[Family, Samples]]:
    """Yield all families of a reading with their values. A part that could not be read has no values."""
    found: dict[Family, Samples] = {family: [] for family in FAMILIES}
    found[UP].append(((), int(reading.up)))
    found[INFO].append(((reading.namespace, reading.version), 1))
    for part, seconds in reading.took.items():
        found[PART_READ].append(((part,), int(part not in reading.errors)))
        found[PART_SECONDS].append(((part,), seconds))
    for agent, counters in reading.agents.items():
        _add_agent(found, agent, counters)
    for cache in reading.caches:
        _add_cache(found, cache)
    for pool in reading.pools:
        _add_pool(found, pool)
    yield from found.items()


def _add_agent(found: dict[Family, Samples], agent: str, counters: Counters) -> None:
    counts = counters.counts
    get = counts.get
    own = (agent,)
    if get("n", 0):
        executions = found[EXECUTIONS]
        executions.append(((agent, "success"), get("ok", 0)))
        executions.append(((agent, "failure"), get("err", 0)))
        executions.append(((agent, "cancelled"), get("cancelled", 0)))
        durations = Durations(get("sum_us", 0), get("h:zero", 0), counters.buckets, get("min_us", 0), get("max_us", 0))
        found[DURATIONS].append((own, durations))
        if "last_ms" in counts:
            found[LAST_EXECUTION].append((own, counts["last_ms"] / 1000))
    for error, failures in counters.errors.items():
        found[ERRORS].append(((agent, error), failures))
    if "tool_calls" in counts:
        found[TOOL_CALLS].append((own, counts["tool_calls"]))
    if "llm_calls" in counts:
        _add_usage(found, agent, counters)


_OF_AGENT = {"n": "llm_calls"}
"""A counter of a model -> the agent's counter that counts the same thing, if the two names differ."""
_MEASURES = ("n", "tok_in", "tok_out", "cost_nano", "tok_cached_in", "tok_cache_write", "tok_reasoning")


def _add_usage(found: dict[Family, Samples], agent: str, counters: Counters) -> None:
    """Add the usage of each model. The rest of the agent's usage has no known model; add it under an empty name."""
    counts, models = counters.counts, dict(counters.models)
    rest = {
        measure: counts.get(_OF_AGENT.get(measure, measure), 0) - sum(each.get(measure, 0) for each in models.values())
        for measure in _MEASURES
    }
    if not models or any(value > 0 for value in rest.values()):
        models[""] = {measure: max(0, value) for measure, value in rest.items()}
    for model, measures in models.items():
        get = measures.get
        own = (agent, model)
        found[LLM_CALLS].append((own, get("n", 0)))
        found[COST].append((own, get("cost_nano", 0) / 1e9))
        found[TOKENS].append(((*own, "input"), get("tok_in", 0)))
        found[TOKENS].append(((*own, "output"), get("tok_out", 0)))
        found[TOKEN_PARTS].append(((*own, "cache_read"), get("tok_cached_in", 0)))
        found[TOKEN_PARTS].append(((*own, "cache_write"), get("tok_cache_write", 0)))
        found[TOKEN_PARTS].append(((*own, "reasoning"), get("tok_reasoning", 0)))


def _add_cache(found: dict[Family, Samples], stats: CacheStats) -> None:
    own = (stats.name, stats.kind)
    found[CACHE_REQUESTS].append(((*own, "hit"), stats.hits))
    found[CACHE_REQUESTS].append(((*own, "miss"), stats.misses))
    found[CACHE_EVICTIONS].append((own, stats.evictions))
    found[CACHE_EXPIRATIONS].append((own, stats.expirations))
    found[CACHE_CORRUPT].append((own, stats.corrupt))
    found[CACHE_SAVED].append((own, stats.seconds_saved))
    tiered = stats.kind == "tiered"
    for tier, one in zip(TIERS, (stats.hot, stats.warm, stats.cold), strict=True):
        if one is stats.cold or tiered:
            found[CACHE_ENTRIES].append(((*own, tier.value), one.size))
            found[CACHE_MAX_ENTRIES].append(((*own, tier.value), one.max_size))
        if tiered:
            found[CACHE_TIER_HITS].append(((*own, tier.value), one.hits))
    found[CACHE_BYTES].append((own, stats.bytes))
    if stats.max_bytes is not None:
        found[CACHE_MAX_BYTES].append((own, stats.max_bytes))


def _add_pool(found: dict[Family, Samples], pool: PoolStatus) -> None:
    own = (pool.agent_type,)
    states = Counter(each.state for each in pool.instances)
    for state in InstanceState:
        found[POOL_INSTANCES].append(((*own, state.value), states[state]))
    found[POOL_HEALTHY].append((own, pool.healthy))
    found[POOL_LOAD].append((own, pool.current_load))
    found[POOL_CAPACITY].append((own, pool.total_capacity))
    found[POOL_WAITERS].append((own, pool.waiting))
    found[POOL_OVERDUE].append((own, pool.overdue))
    found[POOL_PANIC].append((own, int(pool.panic_for is not None)))
    found[POOL_GRANTED].append((own, pool.granted))
    for each in pool.instances:
        one = (pool.agent_type, each.instance.id)
        found[INSTANCE_LOAD].append((one, each.instance.current_load))
        found[INSTANCE_LIMIT].append((one, each.limit))
        found[INSTANCE_RELEASES].append(((*one, "success"), each.served))
        found[INSTANCE_RELEASES].append(((*one, "failure"), each.failed))
        found[INSTANCE_RESPONSE].append((one, each.instance.response_time_ms / 1000))
