"""Benchmarks of pools with several shards, on a Cluster of three nodes.

A pool of one shard and a pool of 16 shards, with 10,000 instances each, get the same calls in turn. The server time of a
node is the time spent in scripts, as the node counts it. The busiest node limits what a pool can do.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy
from agentperf_redis.balancer.commands import Pool, register
from agentperf_redis.balancer.layouts import Layout, layouts_of
from tests.benchmarks.balancer import run_all, saturated
from tests.benchmarks.measure import Bench, Row, Work, micros
from tests.support.servers import Server

SHARDS, INSTANCES, TASKS = 16, 10_000, 50
POOLS = ("one", "many")
SERVER_GOAL, CLIENT_GOAL = 0.45, 1.1
"""Goals: a third of the server time is ideal; 16 shards cannot be divided by three."""


def rows(bench: Bench) -> Iterator[Row]:
    """Yield all rows."""
    server = Server("cluster")
    try:
        with closing(Backend(server.url)) as backend:
            yield from against_one_shard(bench, server, backend)
    finally:
        server.stop()
    yield saturated(bench, shards=8)


def against_one_shard(bench: Bench, server: Server, backend: Backend) -> Iterator[Row]:
    """Compare acquire and release in 16 shards with those in one shard.

    The server time is compared under the load of many tasks of one process, as it matters when a node is busy. The
    client time is that of single calls.
    """
    balancer = LoadBalancer(backend=backend)
    for name, shards in (("one", 1), ("many", SHARDS)):
        fill(backend, balancer, name, shards)
    calls = 3000 if bench.full else 1000
    with asyncio.Runner() as runner:
        for what, work in (("acquire + release", pairs), ("acquire_many + release_many of 10", tens)):
            busiest = []
            for round_ in range(2 * bench.rounds + 1):
                figures = [server_time(server, partial(runner.run, work(balancer, name, calls))) for name in POOLS]
                if round_:  # the first round loads the scripts
                    busiest.append([max(times) / calls for times in figures])
            # Other load on the machine can only lengthen the times.
            reference_us, ours_us = (statistics.quantiles(each, n=4)[0] for each in zip(*busiest, strict=True))
            ratio = ours_us / reference_us
            yield Row(
                f"busiest of 3 nodes, {what}, {INSTANCES:,} instances",
                f"{ours_us:.3g} us",
                f"one shard: {reference_us:.3g} us",
                ratio,
                f"<= {SERVER_GOAL} x",
                ratio <= SERVER_GOAL,
            )
    one, many = (single_calls(balancer, name) for name in POOLS)
    pair = bench.pair(many, one, 300 if bench.full else 150)
    yield Row(
        f"client, acquire + release, {SHARDS} shards",
        micros(pair.ours_s),
        f"one shard: {micros(pair.reference_s)}",
        pair.ratio,
        f"<= {CLIENT_GOAL} x",
        pair.ratio <= CLIENT_GOAL,
    )


def fill(backend: Backend, balancer: LoadBalancer, name: str, shards: int) -> None:
    """Register the instances of a pool, in pipelines."""
    balancer.register_instance(AgentInstance("i0", name, max_capacity=100), shards=shards)
    layout: Layout = layouts_of(backend).of(Pool.of(backend.namespace, name))
    fleet = [AgentInstance(f"i{number}", name, max_capacity=100) for number in range(1, INSTANCES)]
    strategy = LoadBalancingStrategy.LEAST_LOADED
    run_all(backend, [register(layout.home(each.id), each, strategy, 0) for each in fleet])


async def pairs(balancer: LoadBalancer, name: str, calls: int) -> None:
    """Acquire and release leases, one by one in each task."""

    async def work() -> None:
        for _ in range(calls // TASKS):
            await balancer.aio.release(await balancer.aio.acquire(name))

    await asyncio.gather(*(work() for _ in range(TASKS)))


async def tens(balancer: LoadBalancer, name: str, calls: int) -> None:
    """Acquire and release ten leases at once in each task."""

    async def work() -> None:
        for _ in range(calls // TASKS // 10):
            await balancer.aio.release_many(await balancer.aio.acquire_many(name, 10))

    await asyncio.gather(*(work() for _ in range(TASKS)))


def single_calls(balancer: LoadBalancer, name: str) -> Work:
    """Return work: acquire a lease, and release it."""

    def work(times: int) -> None:
        for _ in range(times):
            balancer.release(balancer.acquire(name))

    return work


def server_time(server: Server, work: Callable[[], object]) -> list[int]:
    """Run the work. Return the microseconds that each node spent in scripts."""
    before = script_times(server)
    work()
    return [after - earlier for after, earlier in zip(script_times(server), before, strict=True)]


def script_times(server: Server) -> list[int]:
    """Return the microseconds that each node has spent in scripts."""
    found = []
    for node in server.nodes:
        with node.client() as client:
            stats = client.info("commandstats")
        found.append(sum(stats.get(f"cmdstat_{name}", {}).get("usec", 0) for name in ("eval", "evalsha")))
    return found
