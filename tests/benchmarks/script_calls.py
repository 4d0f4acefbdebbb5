"""Calls of acquire and release in a process that imports one build; `scripts` starts a process per build.

It runs as a file and imports only public names of the library, so that it works in any checkout. Each input line is a
strategy and a piece of work; the process prints a line when the work is done.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.balancer import LoadBalancingStrategy

HELD_S = 3600.0
"""TTL of the leases, so long that none is renewed during the measurement."""


AT_ONCE = 100
"""Calls of one event-loop iteration form one pipeline, so that the server does not wake up for each of them."""


def main(url: str, namespace: str, instances: int, calls: int) -> None:
    """Run the work from stdin, line by line."""
    perf = AgentPerf(url, namespace=namespace)
    held: dict[str, list[Any]] = {}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            name, work = line.split()
            balancer = perf.balancer(strategy=LoadBalancingStrategy(name.removesuffix("-metered")))
            if work == "fill":
                referenced.extend(runner.run(fill(balancer.aio, name, instances)))
            elif work == "acquire":
                held[name] = runner.run(acquire(balancer.aio, name, calls))
            else:
                runner.run(release(balancer.aio, held.pop(name)))
            print("done", flush=True)


async def fill(balancer: Any, name: str, instances: int) -> list[Any]:
    """Register a fleet of unequal weights, and lease as many units as there are instances."""
    rate = {"requests_per_minute": 1e6} if name.endswith("-metered") else {}
    fleet = [AgentInstance(f"i{number}", name, 0, 100, 1.0 + number % 5) for number in range(instances)]
    for at in range(0, instances, AT_ONCE):
        await asyncio.gather(*(balancer.register_instance(each, **rate) for each in fleet[at : at + AT_ONCE]))
    return await acquire(balancer, name, instances)


async def acquire(balancer: Any, name: str, calls: int) -> list[Any]:
    found = []
    for _ in range(0, calls, AT_ONCE):
        found += await asyncio.gather(*(balancer.acquire(name, ttl=HELD_S) for _ in range(AT_ONCE)))
    return found


async def release(balancer: Any, instances: list[Any]) -> None:
    for at in range(0, len(instances), AT_ONCE):
        some = instances[at : at + AT_ONCE]
        await asyncio.gather(*(balancer.release(each, outcome="ok", response_time=0.01) for each in some))


referenced: list[Any] = []
"""References to the leases of `fill`, because a garbage-collected lease is released."""

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
