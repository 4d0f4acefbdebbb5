"""Benchmarks of the balancer: what a label, rate limits and a slow instance cost a caller."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy, PoolSettings, commands
from agentperf_redis.balancer.commands import Pool, Rates
from agentperf_redis.command import Batch
from tests.benchmarks.measure import Bench, Row, Work, micros

FLEET, MATCHING = 10_000, 10
LABEL_GOAL, SLOW_GOAL = 2.0, 1.5
CALLS, EVERY_S, TAKES_S, SLOW_S = 1000, 0.003, 0.01, 0.1
SLOW_CALLS = range(100, 600)
PIPELINED = 500


def on_health(bench: Bench, backend: Backend) -> Iterator[Row]:
    """Yield the rows about labels, rate limits and a slow instance."""
    yield from labels(bench, backend)
    yield rated(bench, backend)
    yield slow_instance(bench)


def labels(bench: Bench, backend: Backend) -> Iterator[Row]:
    """Measure a lease that requires a rare label against a lease without requirements, in the same pool."""
    for strategy in (LoadBalancingStrategy.LEAST_LOADED, LoadBalancingStrategy.WEIGHTED):
        pool = Pool.of(backend.namespace, f"labelled-{strategy.value}")
        fleet = [
            AgentInstance(
                f"i{number}",
                pool.agent_type,
                max_capacity=100,
                labels=frozenset({"gpu"} if number % (FLEET // MATCHING) == 0 else ()),
            )
            for number in range(FLEET)
        ]
        requests = [commands.register(pool, instance, strategy, 0) for instance in fleet]
        for at in range(0, FLEET, PIPELINED):
            backend.run(Batch(tuple(requests[at : at + PIPELINED])))
        balancer = LoadBalancer(backend=backend)
        pair = bench.pair(
            pairs(balancer, pool.agent_type, frozenset({"gpu"})),
            pairs(balancer, pool.agent_type, frozenset()),
            300 if bench.full else 150,
        )
        yield Row(
            f"acquire + release, a label that {MATCHING} of {FLEET:,} have, {strategy.value}",
            micros(pair.ours_s),
            f"without a label: {micros(pair.reference_s)}",
            pair.ratio,
            f"<= {LABEL_GOAL} x",
            pair.ratio <= LABEL_GOAL,
        )


def pairs(balancer: LoadBalancer, name: str, require: frozenset[str]) -> Work:
    """Return work that acquires and releases leases."""

    def work(times: int) -> None:
        for _ in range(times):
            balancer.release(balancer.acquire(name, require=require))

    return work


def rated(bench: Bench, backend: Backend) -> Row:
    """Measure a lease on instances with rate limits against a lease on instances without them."""
    balancer = LoadBalancer(backend=backend)
    for name, rates in (("rated", Rates(1e9, 1e9)), ("unrated", commands.UNLIMITED)):
        pool = Pool.of(backend.namespace, name)
        for number in range(10):
            instance = AgentInstance(f"i{number}", name, max_capacity=100)
            backend.run(commands.register(pool, instance, None, 0, rates=rates))
    ours, reference = (pairs(balancer, name, frozenset()) for name in ("rated", "unrated"))
    pair = bench.pair(ours, reference, 300 if bench.full else 150)
    return Row(
        "acquire + release, requests and tokens per minute",
        micros(pair.ours_s),
        f"without rates: {micros(pair.reference_s)}",
        pair.ratio,
        "",
        None,
    )


def slow_instance(bench: Bench) -> Row:
    """Measure the p99 of 1,000 calls at a steady load while one of ten instances is slow.

    The instance is ten times slower during half of the calls. The figure is the median of three pairs of runs, because
    a single pause of the machine delays about one percent of the calls, which is enough to change the p99.
    """
    pairs = [
        [asyncio.run(_steady(bench, f"steady-{repeat}-{slow}", slow)) for slow in (True, False)] for repeat in range(3)
    ]
    affected, healthy = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return Row(
        "p99 of calls at a steady load, one of ten instances slow",
        f"{affected * 1e3:.3g} ms",
        f"none slow: {healthy * 1e3:.3g} ms",
        ratio,
        f"<= {SLOW_GOAL} x",
        ratio <= SLOW_GOAL,
    )


async def _steady(bench: Bench, name: str, slow: bool) -> float:
    backend = Backend(bench.url)
    balancer = LoadBalancer(settings=PoolSettings(base_ejection_time=0.5, slow_after=3 * TAKES_S), backend=backend)
    for number in range(10):
        await balancer.aio.register_instance(AgentInstance(f"i{number}", name))

    async def call(number: int) -> float:
        begin = time.perf_counter()
        async with balancer.aio.lease(name) as lease:
            is_slow = slow and number in SLOW_CALLS and lease.instance_id == "i3"
            await asyncio.sleep(SLOW_S if is_slow else TAKES_S)
        return time.perf_counter() - begin

    tasks = []
    loop = asyncio.get_running_loop()
    start = loop.time()
    for number in range(CALLS):
        await asyncio.sleep(max(0.0, start + number * EVERY_S - loop.time()))
        tasks.append(asyncio.create_task(call(number)))
    took = sorted(await asyncio.gather(*tasks))
    await backend.aclose()
    return took[round(0.99 * CALLS) - 1]
