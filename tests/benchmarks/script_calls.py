"""A build's calls of acquire and release, made by a process that imports that build; `scripts` starts one for each.

It is run as a file and imports the public names of the library alone, so that it works in any checkout. Each line that
it reads is a strategy and what to do; each is answered by a line when it is done.
"""

from __future__ import annotations

import sys
from typing import Any

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.balancer import LoadBalancingStrategy

HELD_S = 3600.0
"""Leases live for that long, so that none is renewed while the server's time is counted."""


def main(url: str, namespace: str, instances: int, calls: int) -> None:
    """Do what is read, line by line."""
    perf = AgentPerf(url, namespace=namespace)
    held: dict[str, list[Any]] = {}
    for line in sys.stdin:
        name, work = line.split()
        balancer = perf.balancer(strategy=LoadBalancingStrategy(name.removesuffix("-metered")))
        if work == "fill":
            fill(balancer, name, instances)
        elif work == "acquire":
            held[name] = [balancer.acquire(name, ttl=HELD_S) for _ in range(calls)]
        else:
            for instance in held.pop(name):
                balancer.release(instance, outcome="ok", response_time=0.01)
        print("done", flush=True)


def fill(balancer: Any, name: str, instances: int) -> None:
    """Register a fleet of unequal weights, and lease as many units as there are instances."""
    rate = {"requests_per_minute": 1e6} if name.endswith("-metered") else {}
    for number in range(instances):
        balancer.register_instance(AgentInstance(f"i{number}", name, 0, 100, 1.0 + number % 5), **rate)
    kept.extend(balancer.acquire(name, ttl=HELD_S) for _ in range(instances))


kept: list[Any] = []
"""A lease that is collected as garbage is released."""

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
