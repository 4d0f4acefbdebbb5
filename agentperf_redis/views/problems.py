"""The problems of a namespace: firing alerts, failing agents, pools without capacity, damaged or useless caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentperf_redis.alerts.model import AlertState, AlertStatus
from agentperf_redis.balancer.model import InstanceState, PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.views.text import counted

BAD_FAILURE_RATE = 0.1
"""If at least this share of an agent's executions failed, the problem is bad; otherwise it is a note. Retries hide
occasional failures from users, but hardly the failure of every tenth execution."""
LOW_HIT_RATE, _MIN_READS = 0.2, 1000
"""A cache with a lower hit rate, after at least `_MIN_READS` reads, costs more than it saves. Each read costs a lookup,
and each miss also costs a put."""
RECOVERING = (InstanceState.HALF_OPEN, InstanceState.WARMING)
"""States in which an instance takes some work."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        level: "bad", or "note" if the service still works.
        subject: "alert", "agent", "cache" or "pool".
        name: name of the agent, cache or pool; for an alert, the name of its rule.
        text: the problem in words.
        target: for an alert, the name of the agent, cache or pool; otherwise empty.
        scope: for an alert, the kind of `target`: "agent", "cache" or "pool"; otherwise empty.
        kind: for a cache, "lru" or "tiered", because caches of different kinds may share a name; otherwise empty.
    """

    level: str
    subject: str
    name: str
    text: str
    target: str = ""
    scope: str = ""
    kind: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        """The fields of the --json output."""
        return {"level": self.level, "subject": self.subject, "name": self.name, "text": self.text}


def problems(
    agents: Iterable[PerformanceMetrics],
    caches: Iterable[CacheStats],
    pools: Iterable[PoolStatus],
    alerts: Iterable[AlertStatus] = (),
) -> list[Problem]:
    """Return the problems: first the firing alerts, then the other problems of level "bad", then the notes."""
    found = [
        *(problem for alert in alerts for problem in _of_alert(alert)),
        *(problem for agent in agents for problem in _of_agent(agent)),
        *(problem for pool in pools for problem in _of_pool(pool)),
        *(problem for cache in caches for problem in _of_cache(cache)),
    ]
    return sorted(found, key=lambda problem: problem.level != "bad")


def _of_alert(alert: AlertStatus) -> list[Problem]:
    if alert.state is not AlertState.FIRING:
        return []
    text = f"{alert.target}: {alert.when} holds"
    return [Problem("bad", "alert", alert.rule, text, alert.target, alert.scope.removesuffix("s"))]


def _of_agent(agent: PerformanceMetrics) -> list[Problem]:
    if not agent.failure_count:
        return []
    level = "bad" if agent.failure_rate >= BAD_FAILURE_RATE else "note"
    text = f"{agent.failure_count} of {counted(agent.task_count, 'execution')} failed ({agent.failure_rate:.1%})"
    if agent.error_types:
        error, count = max(agent.error_types.items(), key=lambda item: item[1])
        text += f", {count} with {error}"
    return [Problem(level, "agent", agent.agent_name, text)]


def _of_pool(pool: PoolStatus) -> list[Problem]:
    found = []
    working = [each for each in pool.instances if each.state is InstanceState.UP or each.state in RECOVERING]
    # Draining is a decision of the user, so a draining instance is not a problem.
    out = [each for each in pool.instances if each not in working and each.state is not InstanceState.DRAINING]
    if pool.instances and not working:
        found.append(Problem("bad", "pool", pool.agent_type, "no instance takes work"))
    elif out:
        names = ", ".join(f"{each.instance.id} {state_text(each.state)}" for each in out)
        share = f"{len(out)} of {counted(len(pool.instances), 'instance')}"
        text = f"{share} {'takes' if len(out) == 1 else 'take'} no work: {names}"
        found.append(Problem("note", "pool", pool.agent_type, text))
    if pool.panic_for is not None:
        text = f"in panic mode for {pool.panic_for:.0f} s: unhealthy instances get work too"
        found.append(Problem("bad", "pool", pool.agent_type, text))
    if pool.waiting:
        verb = "waits" if pool.waiting == 1 else "wait"
        text = f"{counted(pool.waiting, 'caller')} {verb} for an instance"
        found.append(Problem("note", "pool", pool.agent_type, text))
    return found


def _of_cache(cache: CacheStats) -> list[Problem]:
    found = []
    if cache.corrupt:
        text = f"{counted(cache.corrupt, 'read')} found a damaged entry"
        found.append(Problem("note", "cache", cache.name, text, kind=cache.kind))
    reads = cache.hits + cache.misses
    if reads >= _MIN_READS and cache.hit_rate < LOW_HIT_RATE:
        text = f"only {cache.hit_rate:.1%} of {reads} reads found a value"
        found.append(Problem("note", "cache", cache.name, text, kind=cache.kind))
    return found


def state_text(state: InstanceState) -> str:
    """Return the state of an instance in words: ``heartbeat missed``."""
    return state.value.replace("_", " ")
