"""The result of a demo: the findings, the library's measurements, and the checked promises."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.demo.model_calls import MODELS, NOTE
from agentperf_redis.metrics.model import ModelUsage, PerformanceMetrics


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, whether it held, and the figures that decide it."""

    promise: str
    held: bool
    figures: str


@dataclass(frozen=True, slots=True)
class Casualty:
    """The worker that was killed.

    Attributes:
        number: number of the worker, from 0.
        files: number of files that the worker had reviewed.
        leases: agent types of the leases that the worker held when it was stopped for the kill.
        recovered_after: time from the kill until the last of these leases was gone, s; None if one remained.
    """

    number: int
    files: int
    leases: tuple[str, ...]
    recovered_after: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """A demo's result.

    Attributes:
        root: folder of the tree.
        files: number of files in the tree.
        lines: number of lines in these files.
        findings: number of findings.
        worst: the worst files, each a `Review` as a dict.
        seconds: time from the start of the workers to the end of the last worker, s.
        workers: worker processes started.
        casualty: the killed worker; None if none was killed.
        agents: metrics of each agent.
        caches: statistics of each cache.
        pools: state of the pools at the end.
        instances: number of steps by instance, from the workers' journals.
        computed: computations done by all workers.
        distinct: number of distinct computations among `computed`.
        served: number of results that came from a cache.
        checks: every promise with its result.
        namespace: prefix of all keys.
        llm: whether each step is also recorded as a model call.
    """

    root: str
    files: int
    lines: int
    findings: int
    worst: tuple[dict[str, Any], ...]
    seconds: float
    workers: int
    casualty: Casualty | None
    agents: tuple[PerformanceMetrics, ...]
    caches: tuple[CacheStats, ...]
    pools: tuple[PoolStatus, ...]
    instances: dict[str, int]
    computed: int
    distinct: int
    served: int
    checks: tuple[Check, ...]
    namespace: str
    llm: bool = False

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return all(check.held for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """The promises that did not hold, with their figures."""
        return [f"{check.promise}: {check.figures}" for check in self.checks if not check.held]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: times in s, shares from 0 to 1."""
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "root": self.root,
            "namespace": self.namespace,
            "files": self.files,
            "lines": self.lines,
            "findings": self.findings,
            "worst": list(self.worst),
            "seconds": self.seconds,
            "workers": self.workers,
            "killed": None if self.casualty is None else asdict(self.casualty),
            "agents": {
                each.agent_name: {
                    "steps": each.task_count,
                    "success_rate": each.success_rate,
                    "avg": each.avg_execution_time,
                    "p50": each.p50_execution_time,
                    "p95": each.p95_execution_time,
                    "p99": each.p99_execution_time,
                    "max": each.max_execution_time,
                    "exact": each.exact,
                }
                for each in self.agents
            },
            "caches": {
                each.name: {
                    "hits": each.hits,
                    "misses": each.misses,
                    "hit_rate": each.hit_rate,
                    "size": each.size,
                    "bytes": each.bytes,
                    "seconds_saved": each.seconds_saved,
                }
                for each in self.caches
            },
            "instances": {
                status.instance.id: {
                    "steps": self.instances.get(status.instance.id, 0),
                    "capacity": status.instance.max_capacity,
                    "peak": status.peak_load,
                }
                for pool in self.pools
                for status in pool.instances
            },
            "model_calls": {agent: asdict(use) | {"model": model} for agent, model, use in self._uses()},
            "computed": self.computed,
            "distinct": self.distinct,
            "served": self.served,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_lines(self) -> list[str]:
        """Return the report as plain text."""
        where = f"{self.files} files, {self.lines} lines of {self.root}"
        lines = [f"{where} reviewed by {self.workers} workers in {self.seconds:.1f} s: {self.findings} findings"]
        lines += ["", "The worst files", *self._worst_lines()]
        lines += ["", f"{'agent':<12}{'steps':>8}{'ok':>8}{'avg ms':>9}{'p50':>9}{'p95':>9}{'p99':>9}"]
        for each in self.agents:
            times = (each.avg_execution_time, each.p50_execution_time, each.p95_execution_time, each.p99_execution_time)
            mark = "" if each.exact else f"  (percentiles within {each.error_bound:.2%})"
            figures = "".join(f"{1000 * time:>9.2f}" for time in times)
            lines.append(f"{each.agent_name:<12}{each.task_count:>8}{each.success_rate:>8.1%}{figures}{mark}")
        if self.llm:
            lines += ["", f"Steps as model calls; {NOTE}"]
            lines.append(
                f"{'agent':<12}{'model':<12}{'calls':>8}{'tokens in':>12}{'cached':>12}{'out':>12}{'cost':>12}"
            )
            for agent, model, use in self._uses():
                tokens = f"{use.tokens_in:>12}{use.tokens_cached_in:>12}{use.tokens_out:>12}"
                lines.append(f"{agent:<12}{model:<12}{use.calls:>8}{tokens}{use.cost:>12.4f}")
        lines += ["", f"{'cache':<12}{'reads':>8}{'hits':>8}{'entries':>9}{'bytes':>12}{'seconds saved':>15}"]
        for cache in self.caches:
            reads = cache.hits + cache.misses
            figures = f"{reads:>8}{cache.hit_rate:>8.1%}{cache.size:>9}{cache.bytes:>12}{cache.seconds_saved:>15.1f}"
            lines.append(f"{cache.name:<12}{figures}")
        lines += ["", f"{'instance':<16}{'steps':>8}{'capacity':>10}{'peak':>6}"]
        for pool in self.pools:
            for status in pool.instances:
                its = status.instance
                steps = self.instances.get(its.id, 0)
                lines.append(f"{its.id:<16}{steps:>8}{its.max_capacity:>10}{status.peak_load:>6}")
        lines += ["", *(f"{'ok ' if check.held else 'NOT'}  {check.promise}: {check.figures}" for check in self.checks)]
        return lines

    def _uses(self) -> list[tuple[str, str, ModelUsage]]:
        """Return the name, the made-up model and the usage of each agent that has recorded model calls."""
        models = {each.agent_name: MODELS[each.agent_name].name for each in self.agents if self.llm}
        found = [(each.agent_name, models.get(each.agent_name, ""), each.models) for each in self.agents]
        return [(agent, model, uses[model]) for agent, model, uses in found if model in uses]

    def _worst_lines(self) -> list[str]:
        lines = []
        for review in self.worst:
            kinds = ", ".join(f"{count} {kind}" for kind, count in review["kinds"])
            lines.append(f"{review['points']:>6} points  {review['path']} ({review['lines']} lines): {kinds}")
            first = review["worst"][0] if review["worst"] else None
            if first:
                lines.append(
                    f"{'':15} line {first['line']}: {first['name']}, {first['kind']} {first['detail']}".rstrip()
                )
        return lines
