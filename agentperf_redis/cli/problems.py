"""Finds the problems in an overview of a namespace: failing agents, pools without capacity, damaged caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentperf_redis.balancer.model import InstanceState, PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.cli.agents import BAD_FAILURE_RATE
from agentperf_redis.cli.console import counted
from agentperf_redis.metrics.model import PerformanceMetrics

RECOVERING = (InstanceState.HALF_OPEN, InstanceState.WARMING)
"""States in which an instance takes some work."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        level: "bad", or "note" if the service still works.
        subject: "agent", "cache" or "pool".
        name: name of the agent, cache or pool.
        text: the problem in words.
    """

    level: str
    subject: str
    name: str
    text: str

    @property
    def plain(self) -> dict[str, Any]:
        """The fields of the --json output."""
        return {"level": self.level, "subject": self.subject, "name": self.name, "text": self.text}


def problems(
    agents: Iterable[PerformanceMetrics], caches: Iterable[CacheStats], pools: Iterable[PoolStatus]
) -> list[Problem]:
    """Return the problems, the bad ones first."""
    found = [
        *(problem for agent in agents for problem in _of_agent(agent)),
        *(problem for pool in pools for problem in _of_pool(pool)),
        *(problem for cache in caches for problem in _of_cache(cache)),
    ]
    return sorted(found, key=lambda problem: problem.level != "bad")


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
    # Draining is a decision of the user, so it is no problem.
    out = [each for each in pool.instances if each not in working and each.state is not InstanceState.DRAINING]
    if pool.instances and not working:
        found.append(Problem("bad", "pool", pool.agent_type, "no instance takes work"))
    elif out:
        names = ", ".join(f"{each.instance.id} {_in_words(each.state)}" for each in out)
        share = f"{len(out)} of {counted(len(pool.instances), 'instance')}"
        found.append(
            Problem("note", "pool", pool.agent_type, f"{share} {'takes' if len(out) == 1 else 'take'} no work: {names}")
        )
    if pool.panic_for is not None:
        text = f"in panic mode for {pool.panic_for:.0f} s: unhealthy instances get work too"
        found.append(Problem("bad", "pool", pool.agent_type, text))
    if pool.waiting:
        callers = counted(pool.waiting, "caller")
        verb = "waits" if pool.waiting == 1 else "wait"
        found.append(Problem("note", "pool", pool.agent_type, f"{callers} {verb} for an instance"))
    return found


def _of_cache(cache: CacheStats) -> list[Problem]:
    if not cache.corrupt:
        return []
    return [Problem("note", "cache", cache.name, f"{counted(cache.corrupt, 'read')} found a damaged entry")]


def _in_words(state: InstanceState) -> str:
    return state.value.replace("_", " ")
