"""Benchmarks of pools with several shards, on a Cluster of three nodes.

A pool of one shard and a pool of 16 shards, with 10,000 instances each, get the same calls in turn. The server time of
a node is the time spent in scripts, as the node counts it. The busiest node limits what a pool can do.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy, commands
from agentperf_redis.balancer.commands import ANY, Pool, register
from agentperf_redis.balancer.layouts import Layout, layouts_of
from tests.benchmarks.balancer import run_all, saturated
from tests.benchmarks.measure import Bench, Row, Work, micros, timed
from tests.benchmarks.nodes import run_by_node
from tests.support.servers import Server

SHARDS, INSTANCES, CALLS = 16, 10_000, 400
SERVER_GOAL, CLIENT_GOAL = 0.45, 1.1
"""Maximum ratios to a pool with one shard: of the server time on the busiest of 3 nodes, and of the client's time. For
the server time, a third is ideal, but 16 shards cannot be divided by three."""

_numbers = itertools.count()


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

    The server time is measured with pipelined calls, on one node after the other. The client time is measured with
    single calls.
    """
    balancer = LoadBalancer(backend=backend)
    layouts = [fill(backend, balancer, name, shards) for name, shards in (("one", 1), ("many", SHARDS))]
    for what, work in (("acquire + release", singles), ("acquire_many + release of 10", tens)):
        busiest = []
        spread: Counter[int] = Counter()
        for number in range(3 * bench.rounds + 1):
            figures = [server_time(server, partial(work, backend, layout)) for layout in layouts]
            if number:  # round 0 is not counted, because it loads the scripts
                busiest.append([max(times) / CALLS for times in figures])
                spread.update(dict(enumerate(figures[1])))
        # Other load on the machine can only lengthen the times. So the lower quartiles are compared.
        reference_us, ours_us = (statistics.quantiles(each, n=4)[0] for each in zip(*busiest, strict=True))
        shares = "/".join(f"{100 * usec / spread.total():.0f}" for usec in spread.values())
        yield Row(
            f"busiest of 3 nodes, {what}, {INSTANCES:,} instances, {SHARDS} shards ({shares} %)",
            f"{ours_us:.3g} us",
            f"one shard: {reference_us:.3g} us",
            ours_us / reference_us,
            f"<= {SERVER_GOAL} x",
            ours_us / reference_us <= SERVER_GOAL,
        )
    yield from client_time(bench, balancer)


def client_time(bench: Bench, balancer: LoadBalancer) -> Iterator[Row]:
    """Compare the duration of single calls, and the processor time that the client uses for a call.

    Each call wakes a server. On a machine that is busy, or has fewer cores than nodes, waking the server takes longer
    than the call itself.
    """
    works = [single_calls(balancer, name) for name in ("one", "many")]
    rounds = [[both_times(work) for work in works] for _ in range(8 * bench.rounds)]
    for number, what in enumerate(("client", "processor time of the client")):
        columns = zip(*([each[number] for each in found] for found in rounds), strict=True)
        reference_s, ours_s = (statistics.quantiles(each, n=10)[0] for each in columns)
        yield Row(
            f"{what}, acquire + release, {SHARDS} shards",
            micros(ours_s),
            f"one shard: {micros(reference_s)}",
            ours_s / reference_s,
            f"<= {CLIENT_GOAL} x",
            ours_s / reference_s <= CLIENT_GOAL,
        )


def both_times(work: Work, times: int = 50) -> tuple[float, float]:
    """Return the duration of one call and the processor time that this process uses for it, both in seconds."""
    start = time.process_time()
    took = timed(work, times)
    return took, (time.process_time() - start) / times


def fill(backend: Backend, balancer: LoadBalancer, name: str, shards: int) -> Layout:
    """Register the instances of a pool, in pipelines. Returns the layout of the pool."""
    balancer.register_instance(AgentInstance("i0", name, max_capacity=100), shards=shards)
    layout = layouts_of(backend).of(Pool.of(backend.namespace, name))
    fleet = [AgentInstance(f"i{number}", name, max_capacity=100) for number in range(1, INSTANCES)]
    strategy = LoadBalancingStrategy.LEAST_LOADED
    run_all(backend, [register(layout.home(each.id), each, strategy, 0) for each in fleet])
    return layout


def singles(backend: Backend, layout: Layout) -> None:
    """Acquire leases in the shards that calls would pick, and release them."""
    chosen = [(next(layout.in_order()), f"@bench:{next(_numbers)}") for _ in range(CALLS)]
    granted = run_by_node(backend, [commands.acquire(shard, token, 60_000, ANY) for shard, token in chosen])
    found = zip(chosen, granted, strict=True)
    release(backend, layout, [(shard, token, grant) for (shard, token), grant in found])


def tens(backend: Backend, layout: Layout) -> None:
    """Acquire ten leases in each call, in the shards that a call would pick, and release them."""
    requests: list[tuple[Pool, list[str]]] = []
    for _ in range(CALLS):
        for shard, count in layout.split(10) if layout.is_divided else [(layout.shards[0], 10)]:
            requests.append((shard, [f"@bench:{next(_numbers)}" for _ in range(count)]))
    answers = run_by_node(backend, [commands.acquire_many(shard, tokens, 60_000, ANY) for shard, tokens in requests])
    found = zip(requests, answers, strict=True)
    release(backend, layout, [(shard, *each) for (shard, _), answer in found for each in answer.items()])


def release(backend: Backend, layout: Layout, leases: list[tuple[Pool, str, Any]]) -> None:
    """Pass the load and capacity in each grant on to the layout, and release the leases."""
    for shard, _, granted in leases:
        layout.hear(shard, granted.load, granted.cap)
    run_by_node(backend, [commands.release(shard, token, each.facts[0]) for shard, token, each in leases])
    for shard, _, _ in leases:
        layout.released(shard)


def single_calls(balancer: LoadBalancer, name: str) -> Work:
    """Return a function that acquires and releases a lease, as often as requested."""

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
