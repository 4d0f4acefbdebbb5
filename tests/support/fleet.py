"""A fleet of agents at work: real calls of the library with invented durations, for pages and pictures.

`python -m tests.support.fleet --url URL --minutes 15` runs a fleet in real time. It takes little processor time, since
its agents sleep. Half-way through, one instance starts to fail and one agent gets slow, so that there is something to
see.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import AgentPerfError

RULES = """
[[alert]]
name = "coder is slow"
agents = "coder"
when = "p95 > 2s"
window = "2m"
severity = "page"

[[alert]]
name = "an agent fails"
agents = "*"
when = "failure_rate > 20%"
window = "5m"
for = "1m"
min_events = 20

[[alert]]
name = "answers are cached"
cache = "answers"
when = "hit_rate < 30%"
window = "5m"

[[alert]]
name = "callers wait for a coder"
pool = "coder"
when = "waiters > 0"
for = "10s"
"""
"""Alert rules. Some of these alerts fire."""


@dataclass(frozen=True, slots=True)
class Role:
    """An agent of the fleet.

    Attributes:
        name: the name of the agent, and of its pool.
        pause: mean time between two executions of one of its loops, s.
        spans: names of its stages, and their mean durations, s.
        loops: number of its concurrent loops.
        model: the model that it uses; empty for none.
        failure: share of executions that fail.
    """

    name: str
    pause: float
    spans: Sequence[tuple[str, float]]
    loops: int = 2
    model: str = "large-1"
    failure: float = 0.01


ROLES = (
    Role("planner", 1.5, (("read", 0.05), ("think", 0.4))),
    Role("researcher", 0.8, (("search", 0.2), ("read", 0.15), ("rank", 0.03)), loops=3, model="small-2", failure=0.03),
    Role("coder", 1.0, (("plan", 0.15), ("write", 0.5), ("test", 0.25)), loops=4),
    Role("reviewer", 2.0, (("diff", 0.03), ("think", 0.3)), failure=0.02),
    Role("summariser", 1.2, (("summarise", 0.12),), model="small-2"),
    Role("tool:shell", 0.5, (("run", 0.02),), model="", failure=0.05),
)
ERRORS = (TimeoutError, ConnectionResetError, ValueError)


class Fleet:
    """The agents of one process.

    Args:
        perf: the library.
        seed: seed of all invented numbers.
        seconds: length of the run, s.
    """

    def __init__(self, perf: AgentPerf, seed: int, seconds: float) -> None:
        self._perf = perf
        self._random = random.Random(seed)
        self._began = time.monotonic()
        self._seconds = seconds
        self._balancer = perf.balancer()
        self._answers = perf.cache("answers", max_size=2000, default_ttl=3600)
        self._pages = perf.tiered_cache("pages", hot_size=50, warm_size=200, cold_size=1000)

    @property
    def progress(self) -> float:
        """The part of the run that is over, 0 to 1."""
        return min(1.0, (time.monotonic() - self._began) / self._seconds)

    async def run(self) -> None:
        """Register the instances, and let all agents work until the end."""
        for role in ROLES:
            for number in range(2):
                with suppress(AgentPerfError):
                    await self._balancer.aio.register_instance(
                        AgentInstance(
                            f"{role.name}-{number + 1}",
                            role.name,
                            max_capacity=2 if role.name == "coder" else 3,
                            labels=frozenset({"gpu"} if number else {"cpu"}),
                        )
                    )
        loops = [self._work(role) for role in ROLES for _ in range(role.loops)]
        await asyncio.gather(*loops)

    async def _work(self, role: Role) -> None:
        while self.progress < 1:
            await asyncio.sleep(self._random.expovariate(1 / role.pause))
            with suppress(*ERRORS, AgentPerfError):
                async with self._balancer.aio.lease(role.name, wait=5) as lease:
                    await self._execute(role, lease.instance.id)

    async def _execute(self, role: Role, instance: str) -> None:
        late = self.progress > 0.5
        slow = 3.0 if late and role.name == "coder" else 1.0
        failure = 0.35 if late and instance == "researcher-2" else role.failure
        metrics = self._perf.metrics
        with metrics.track(role.name):
            for span, mean in role.spans:
                with metrics.span(role.name, span):
                    await asyncio.sleep(mean * slow * self._random.lognormvariate(0, 0.5))
            await self._read()
            if role.model:
                sent, received = self._random.randint(300, 4000), self._random.randint(20, 700)
                price = sent * 3e-6 + received * 15e-6
                metrics.record_llm(
                    role.name, model=role.model, tokens_in=sent, tokens_out=received, cost=round(price, 6)
                )
            if self._random.random() < failure:
                raise self._random.choice(ERRORS)

    async def _read(self) -> None:
        question = int(self._random.paretovariate(0.6)) % 3000
        key = f"question {question}: how do I do this?"
        if await self._answers.aio.get(key) is None:
            await self._answers.aio.put(key, "an answer " * (question % 40 + 1), tags=["faq", f"topic-{question % 5}"])
        page = f"https://docs.example/{int(self._random.paretovariate(0.9)) % 900}"
        await self._pages.aio.get_or_compute(page, lambda: page * 20)


async def _main(url: str, namespace: str, seconds: float, seed: int) -> None:
    async with AgentPerf(url, namespace=namespace) as perf:
        fleet = Fleet(perf, seed, seconds)
        await perf.alerts.aio.deploy(text=RULES)
        evaluation = asyncio.create_task(perf.alerts.aio.run())
        try:
            await fleet.run()
        finally:
            evaluation.cancel()
            with suppress(asyncio.CancelledError):
                await evaluation


def main() -> None:
    """Run a fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--namespace", default="agentperf")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    asyncio.run(_main(given.url, given.namespace, given.minutes * 60, given.seed))


if __name__ == "__main__":
    main()
