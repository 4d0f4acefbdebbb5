"""A worker's agents: each step of a review leases an instance, caches its result and records its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil
from typing import NoReturn, TypeVar

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.tiered import TieredCache
from agentperf_redis.demo import agents
from agentperf_redis.demo.agents import Finding, Outline, Review
from agentperf_redis.demo.journal import Journal
from agentperf_redis.demo.model_calls import call_of
from agentperf_redis.demo.tree import Tree
from agentperf_redis.errors import LeaseLost

T = TypeVar("T")
Names = tuple[str, ...] | None

READER, CRITIC, LIBRARIAN, SUMMARISER = AGENTS = ("reader", "critic", "librarian", "summariser")
FILES_CACHE, MODULES_CACHE = "files", "modules"
EDITION = "1"
"""Version of the agents. It is part of every cache key, so results of other versions are never found."""
WAIT_S = 60.0
"""How long a step waits in the queue for an instance. It is longer than the TTL of a dead worker's lease."""
_CHECK_EVERY_S = 0.05
KEEP_S = 3600.0
"""TTL of cached results, s. It is limited so that a demo leaves nothing on a server for long."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The instances for a number of workers. Their capacity is less than the workers need, so the workers share it.

    Attributes:
        workers: number of worker processes.
    """

    workers: int

    def instances(self) -> list[AgentInstance]:
        """Return the instances to register."""
        few, several = max(1, ceil(self.workers / 4)), max(1, ceil(self.workers / 2))
        plan = {READER: (2, few), CRITIC: (2, few), LIBRARIAN: (1, several), SUMMARISER: (1, several)}
        return [
            AgentInstance(f"{agent}-{number + 1}", agent, max_capacity=capacity)
            for agent, (count, capacity) in plan.items()
            for number in range(count)
        ]


def caches(perf: AgentPerf, tree: Tree) -> tuple[LRUCache, TieredCache]:
    """Return the cache of file results and the cache of module names. Each has capacity for all entries."""
    files = perf.cache(FILES_CACHE, max_size=2 * len(tree.files) + 100, default_ttl=KEEP_S)
    return files, perf.tiered_cache(MODULES_CACHE, cold_size=2000 + 4 * len(tree.files))


class Team:
    """The agents of one worker.

    Args:
        perf: the library.
        tree: the tree to review.
        journal: the worker's journal.
        lease_ttl: TTL of a lease without renewal, s.
        llm: whether each step is also recorded as a model call.
    """

    def __init__(self, perf: AgentPerf, tree: Tree, journal: Journal, lease_ttl: float, *, llm: bool = False) -> None:
        self._llm = llm
        self._computed = False
        self._tree = tree
        self._journal = journal
        self._lease_ttl = lease_ttl
        self._balancer = perf.balancer()
        self._metrics = perf.metrics
        results, self._modules = caches(perf, tree)
        self._search = tree.search

        @results.cached(name="outline", version=EDITION)
        def outline(file: str, digest: str) -> Outline:
            source = self._source(file, digest)
            name, is_package = tree.module_name(file), file.rpartition("/")[2] == "__init__.py"
            return self._compute(f"{READER} {file}", lambda: agents.read(source, name, is_package=is_package))

        @results.cached(name="findings", version=EDITION)
        def findings(file: str, digest: str) -> tuple[Finding, ...]:
            source = self._source(file, digest)
            return self._compute(f"{CRITIC} {file}", lambda: agents.criticise(source))

        self._outline, self._findings = outline, findings

    def review(self, file: str) -> Review:
        """Review one file in four steps, one for each agent.

        Args:
            file: one of the tree's files.

        Returns:
            The review.
        """
        source = (self._tree.root / file).read_bytes()
        digest = sha256(source).hexdigest()
        outline = self._step(READER, lambda: self._outline(file, digest), source)
        self._journal.used(f"{READER} {file}")
        findings = self._step(CRITIC, lambda: self._findings(file, digest), source)
        self._journal.used(f"{CRITIC} {file}")
        modules = sorted({each.module for each in outline.imports})
        libraries = self._step(LIBRARIAN, lambda: {module: self._names(module) for module in modules}, modules)
        given = (outline, findings, libraries)
        review = self._step(SUMMARISER, lambda: agents.summarise(file, *given), *given)
        self._journal.reviewed(file)
        return review

    def hold(self, check: Callable[[], None]) -> NoReturn:
        """Keep an instance leased until this process is killed.

        Args:
            check: called repeatedly; may exit the process.
        """
        while True:
            with suppress(LeaseLost), self._balancer.lease(READER, wait=WAIT_S, ttl=self._lease_ttl) as lease:
                while lease.held:
                    check()
                    time.sleep(_CHECK_EVERY_S)

    def _step(self, agent: str, work: Callable[[], T], *given: object) -> T:
        """Run the work of an agent on a leased instance. `given` is the input of the work."""
        self._computed = agent == SUMMARISER  # the summariser's work is not cached, so it is always computed
        try:
            with self._balancer.lease(agent, wait=WAIT_S, ttl=self._lease_ttl) as lease:
                began = time.perf_counter()
                try:
                    result = work()
                except Exception as error:
                    self._metrics.record_execution(agent, time.perf_counter() - began, False, type(error).__name__)
                    raise
                took = time.perf_counter() - began
                self._journal.step(agent, lease.instance_id)
                self._metrics.record_execution(agent, took, True)
                if self._llm:
                    call = call_of(agent, given, result, from_cache=not self._computed)
                    self._metrics.record_llm(agent, **asdict(call))
        except LeaseLost:
            self._journal.lost(agent)  # the work is done and has no side effects, so its result is used
        return result

    def _names(self, module: str) -> Names:
        names: Names = self._modules.get_or_compute(
            f"{EDITION} {module}",
            lambda: self._compute(f"{LIBRARIAN} {module}", lambda: agents.public_names(module, self._search)),
        )
        self._journal.used(f"{LIBRARIAN} {module}")
        return names

    def _compute(self, key: str, work: Callable[[], T]) -> T:
        self._computed = True
        self._journal.began(key)
        began = time.perf_counter()
        result = work()
        self._journal.computed(key, time.perf_counter() - began)
        return result

    def _source(self, file: str, digest: str) -> bytes:
        source = (self._tree.root / file).read_bytes()
        if sha256(source).hexdigest() != digest:
            raise RuntimeError(f"{file} changed during its review")
        return source
