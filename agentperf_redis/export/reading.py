"""One reading of a namespace for the exporters: all-time counters of agents, statistics of caches, status of pools."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.cache.model import CacheStats
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.counters import Counters

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a namespace.

    Attributes:
        namespace: the namespace.
        version: version of the library.
        agents: all-time counters by agent.
        caches: statistics of all caches.
        pools: status of all pools.
        took: how long the read of each part took, s. The parts are ``agents``, ``caches`` and ``pools``. A part that
            was not read, because the server was unreachable, is missing.
        errors: the error of each part that could not be read.
    """

    namespace: str
    version: str
    agents: Mapping[str, Counters] = field(default_factory=dict)
    caches: tuple[CacheStats, ...] = ()
    pools: tuple[PoolStatus, ...] = ()
    took: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, AgentPerfError] = field(default_factory=dict)

    @property
    def up(self) -> bool:
        """Whether the server could be reached."""
        return not any(isinstance(error, BackendUnavailable) for error in self.errors.values())


def read(perf: AgentPerf) -> Reading:
    """Read the namespace.

    This function raises no error of the library. If one part cannot be read, the others are still returned. As soon as
    the server proves unreachable, the remaining parts are not read.
    """
    took: dict[str, float] = {}
    errors: dict[str, AgentPerfError] = {}

    def part(name: str, work: Callable[[], T], empty: T) -> T:
        if any(isinstance(error, BackendUnavailable) for error in errors.values()):
            return empty
        began = time.perf_counter()
        try:
            return work()
        except AgentPerfError as error:
            errors[name] = error
            return empty
        finally:
            took[name] = time.perf_counter() - began

    backend = perf.backend
    flusher = perf.metrics._flusher  # noqa: SLF001  reading stored counters is not part of the public API
    return Reading(
        namespace=backend.namespace,
        version=_version(),
        agents=part("agents", lambda: backend.run(flows.totals(flusher)), {}),
        caches=part("caches", lambda: tuple(perf.caches()), ()),
        pools=part("pools", lambda: tuple(perf.balancer().status()), ()),
        took=took,
        errors=errors,
    )


@lru_cache(maxsize=1)
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("agentperf-redis")
    except PackageNotFoundError:  # the package runs without installation
        return "unknown"
