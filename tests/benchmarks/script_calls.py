"""A program that calls acquire and release of one checkout of the library.

The benchmark `scripts` runs this program for each checkout. The program imports only public names of the library, so it
works in any checkout. Each line of stdin has a strategy and a piece of work. The program prints a line when the work is
done.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.balancer import LoadBalancingStrategy

HELD_S = 3600.0
"""TTL of the leases, s: so long that no lease is renewed during the measurement."""


AT_ONCE = 100
"""Calls that start in the same tick of the event loop. They form one pipeline, so the server wakes up only once."""


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
    """Register instances with unequal weights, and acquire as many leases as there are instances."""
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
"""References to the leases of `fill`, because a lease is released when it is garbage-collected."""

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
