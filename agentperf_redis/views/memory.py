"""The memory of a namespace on the server: its use by kind of key, and a forecast for the metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass

from agentperf_redis import keys
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cache.flows.inspection import read_all_stats
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.metrics.retention import MemoryForecast, Retention, memory_forecast
from agentperf_redis.transport.executor import Executor
from agentperf_redis.views.reading import Fault, Parts, flusher_of
from agentperf_redis.views.scanning import Scan, primaries

SAMPLE_KEYS = 200
"""Number of keys of each kind and part whose memory is measured. Their mean is the estimate for the other keys."""
MAX_KINDS = 50
"""Maximum number of kinds that are shown one by one. Each cache and each pool is a kind of its own."""
_RATE_WINDOW = "1h"


@dataclass(frozen=True, slots=True)
class KindMemory:
    """The memory of one kind of keys.

    Attributes:
        kind: the kind, such as "metrics, slices of a minute" or "cache answers".
        keys: number of keys found.
        bytes: their memory. If there are more than `SAMPLE_KEYS` similar keys, it is estimated from a sample of them.
        share: its part of the bytes of all kinds, 0 to 1.
    """

    kind: str
    keys: int
    bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class MemoryView:
    """The memory of a namespace on the server.

    Attributes:
        used: bytes that the whole server uses; None if the user may not run INFO (``+info``).
        limit: the server's ``maxmemory``, bytes; None without a limit, or if unknown.
        kinds: memory by kind of key, the largest first, and "others" last; empty if the user may not run SCAN and
            MEMORY USAGE (``+scan +memory|usage``).
        complete: whether all keys were found; otherwise `kinds` covers only the part that was searched.
        caches: statistics of all caches, the largest first. Their bytes are exact, but exclude the server's overhead.
        forecast: memory that metrics will take once all slices are filled, within a factor of 1.5.
        retention: the retention of the namespace, for which the forecast holds.
        agents: number of agents with executions in the last hour; the forecast is for that many agents.
        per_second: executions per second and agent in the last hour; the forecast assumes this rate.
        faults: parts that could not be read.
    """

    used: int | None
    limit: int | None
    kinds: tuple[KindMemory, ...]
    complete: bool
    caches: tuple[CacheStats, ...]
    forecast: MemoryForecast
    retention: Retention
    agents: int
    per_second: float
    faults: tuple[Fault, ...]


def memory(perf: AgentPerf) -> MemoryView:
    """Read the memory of a namespace. It blocks for up to about two seconds; use `read_memory` in an event loop."""
    flusher = flusher_of(perf)
    parts = Parts(
        agents=flows.agents(flusher, _RATE_WINDOW, percentiles=False),
        caches=read_all_stats(perf.backend),
        retention=flows.retention(flusher),
    )
    perf.backend.run(parts.read())
    agents: dict[str, PerformanceMetrics] = parts.get("agents", {})
    faults = list(parts.faults)
    used, limit = _server_memory(perf, faults)
    kinds, complete = _kinds(perf, faults)
    caches: list[CacheStats] = parts.get("caches", [])
    retention = parts.get("retention", Retention())
    busy = [each for each in agents.values() if each.task_count]
    rate = sum(each.throughput for each in busy) / len(busy) if busy else 0.0
    return MemoryView(
        used,
        limit,
        kinds,
        complete,
        tuple(sorted(caches, key=lambda each: (-each.bytes, each.name))),
        memory_forecast(retention, agents=max(1, len(busy)), per_second=max(rate, 1e-6)) if busy else _NOTHING,
        retention,
        len(busy),
        rate,
        tuple(faults),
    )


_NOTHING = MemoryForecast(0, 0, 0)


async def read_memory(perf: AgentPerf) -> MemoryView:
    """See `memory`. It runs on another thread."""
    return await asyncio.to_thread(memory, perf)


def _server_memory(perf: AgentPerf, faults: list[Fault]) -> tuple[int | None, int | None]:
    """Return the used bytes and the limit of all primaries together."""
    used = limit = 0
    try:
        for server in primaries(perf.backend):
            facts = server.run(Command("INFO", (), ("memory",), _facts))
            used += facts.get("used_memory", 0)
            limit += facts.get("maxmemory", 0)
    except AgentPerfError as error:  # the Redis user may lack the right to run INFO; the other parts are still shown
        faults.append(Fault("memory of the server", str(error)))
        return None, None
    return used, limit or None


def _facts(reply: Reply) -> dict[str, int]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def _kinds(perf: AgentPerf, faults: list[Fault]) -> tuple[tuple[KindMemory, ...], bool]:
    scan = Scan(perf.backend, f"{perf.backend.namespace}:*")
    groups: dict[tuple[str, str], _Group] = {}
    try:
        for server, page in scan.pages():
            wanted: list[tuple[_Group, str]] = []
            for key in page:
                group = groups.setdefault(group_of(key), _Group())
                if group.found():
                    wanted.append((group, key))
            for (group, _), measured in zip(wanted, _measured(server, [key for _, key in wanted]), strict=True):
                group.measured(measured)
    except AgentPerfError as error:
        faults.append(Fault("memory by kind", str(error)))
        return (), False
    kinds: dict[str, tuple[int, int]] = {}
    for (kind, _), group in groups.items():
        count, size = kinds.get(kind, (0, 0))
        kinds[kind] = (count + group.keys, size + group.bytes)
    return _rows(kinds), scan.complete


def _rows(found: Mapping[str, tuple[int, int]]) -> tuple[KindMemory, ...]:
    """Return the kinds with the most memory, and all others as one. `found` has the keys and bytes of each kind."""
    ordered = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
    shown, rest = dict(ordered[:MAX_KINDS]), ordered[MAX_KINDS:]
    if rest:
        shown["others"] = (sum(count for _, (count, _) in rest), sum(size for _, (_, size) in rest))
    total = sum(size for _, size in shown.values())
    return tuple(KindMemory(name, count, size, size / total if total else 0.0) for name, (count, size) in shown.items())


class _Group:
    """Keys of one kind with the same part of the name, such as the entries of a cache. Only a sample is measured."""

    def __init__(self) -> None:
        self.keys = 0
        self._samples: list[int] = []

    def found(self) -> bool:
        """Count a key. Return whether its memory should be measured: only the first keys are.

        SCAN returns keys in the order of their hashes, so the first keys are a fair sample.
        """
        self.keys += 1
        return self.keys <= SAMPLE_KEYS

    def measured(self, count: int) -> None:
        """Add the memory of a key; 0 if the key no longer exists."""
        if count:
            self._samples.append(count)

    @property
    def bytes(self) -> int:
        """Estimate the memory of all keys."""
        return round(self.keys * sum(self._samples) / len(self._samples)) if self._samples else 0


def _measured(server: Executor, names: list[str]) -> list[int]:
    return server.run(_usage(names)) if names else []


def _usage(names: list[str]) -> Flow[list[int]]:
    return (
        yield from Batch(tuple(Command("MEMORY", (), ("USAGE", name), lambda reply: int(reply or 0)) for name in names))
    )


_SERVICE = re.compile(r"[^:]*:\{([a-z]+)(?::([^}]*))?\}:([^:]*)")
_METRICS = {
    "total": "metrics, counts of all time",
    "10s": "metrics, slices of 10 s",
    "1m": "metrics, slices of a minute",
    "1h": "metrics, slices of an hour",
    "1d": "metrics, slices of a day",
    "latest": "metrics, latest executions",
    "slices": "metrics, closed slices",
    "slow": "metrics, slowest executions",
}


def group_of(key: str) -> tuple[str, str]:
    """Return the kind of a key in words, and the part of its name after the resource: ``("cache answers", "e")``.

    Further examples of kinds are ``metrics, slices of a minute`` and ``pool coder``. Keys with the same part are about
    equally large.
    """
    found = _SERVICE.match(key)
    if found is None:
        return "namespace", ""
    service, resource, part = found[1], keys.decoded(keys.whole_resource(found[2] or "")), found[3]
    if service == "metrics":
        return _METRICS.get(part, "metrics, indexes"), part
    if service == "cache":
        return f"cache {resource}", part
    if service == "tiered":
        return f"tiered cache {resource}", part
    return f"pool {resource}" if service == "lb" else service, part
