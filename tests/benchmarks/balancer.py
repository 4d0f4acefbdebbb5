"""The balancer: one pair of acquire and release, at any size, under every strategy; the line; server time; memory."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy, commands
from agentperf_redis.balancer.commands import ANY, Pool
from agentperf_redis.command import Batch, Command
from agentperf_redis.script import Script
from tests.benchmarks.measure import Bench, Row, Work, micros

SLOTS, HELD_S = 10, 0.2
PAIR_GOAL, HASH_PAIR_GOAL, SIZE_GOAL = 2.3, 2.6, 1.3
ACQUIRE_GOAL_US, RELEASE_GOAL_US = 30.0, 20.0
USE_GOAL = 0.9
MEMORY_GOAL_BYTES = {"instance": 1.3 * 254, "lease": 1.3 * 250}
PIPELINED = 100

_numbers = itertools.count()


def rows(bench: Bench) -> Iterator[Row]:
    """All of the balancer."""
    backend = Backend(bench.url)
    sizes = (10, 1000, 10_000) if bench.full else (10, 100, 1000)
    for strategy in LoadBalancingStrategy:
        for size in sizes:
            fill(backend, strategy, size)
        yield from against_bare_scripts(bench, backend, strategy)
        for size in sizes[1:]:
            yield against_small(bench, backend, strategy, size)
    yield from server_time(bench, backend, sizes[-1])
    yield from memory(bench, backend)
    yield from hand_off(bench)
    yield saturated(bench)
    backend.close()


def times(bench: Bench) -> int:
    """Pairs a round."""
    return 300 if bench.full else 150


def pool_name(strategy: LoadBalancingStrategy, size: int) -> str:
    return f"{strategy.value}-{size}"


def run_all(backend: Backend, work: Sequence[Command[Any]]) -> None:
    for at in range(0, len(work), PIPELINED):
        backend.run(Batch(tuple(work[at : at + PIPELINED])))


def fill(backend: Backend, strategy: LoadBalancingStrategy, size: int) -> Pool:
    """Register a fleet of unequal weights, a third of its capacity leased."""
    name = pool_name(strategy, size)
    pool = Pool.of(backend.namespace, name)
    fleet = [AgentInstance(f"i{number}", name, 0, 100, 1.0 + number % 5) for number in range(size)]
    run_all(backend, [commands.register(pool, instance, strategy, 0) for instance in fleet])
    run_all(
        backend, [commands.acquire(pool, f"@held:{number}", 3_600_000, ANY) for number in range(min(size * 3, 10_000))]
    )
    return pool


def pairs(balancer: LoadBalancer, name: str) -> Work:
    def work(times: int) -> None:
        for _ in range(times):
            balancer.release(balancer.acquire(name))

    return work


def against_bare_scripts(bench: Bench, backend: Backend, strategy: LoadBalancingStrategy) -> Iterator[Row]:
    client = bench.client()
    sha = client.script_load("return 1")

    def bare(times: int) -> None:
        for _ in range(times):
            client.evalsha(sha, 0)
            client.evalsha(sha, 0)

    pair = bench.pair(pairs(LoadBalancer(backend=backend), pool_name(strategy, 10)), bare, times(bench))
    goal = HASH_PAIR_GOAL if strategy is LoadBalancingStrategy.CONSISTENT_HASH else PAIR_GOAL
    yield Row(
        f"acquire + release, {strategy.value}, 10 instances",
        micros(pair.ours_s),
        f"two bare EVALSHA {micros(pair.reference_s)}",
        pair.ratio,
        f"<= {goal} x",
        pair.ratio <= goal,
    )
    client.close()


def against_small(bench: Bench, backend: Backend, strategy: LoadBalancingStrategy, size: int) -> Row:
    balancer = LoadBalancer(backend=backend)
    large, small = (pairs(balancer, pool_name(strategy, each)) for each in (size, 10))
    pair = bench.pair(large, small, times(bench))
    return Row(
        f"acquire + release, {strategy.value}, {size:,} instances",
        micros(pair.ours_s),
        f"the same at 10: {micros(pair.reference_s)}",
        pair.ratio,
        f"<= {SIZE_GOAL} x",
        pair.ratio <= SIZE_GOAL,
    )


def server_time(bench: Bench, backend: Backend, size: int) -> Iterator[Row]:
    """The server's own count of microseconds per script, pipelined, with that many instances and leases."""
    client: Any = bench.client()
    bare = _usec_per_call(client, backend, [Command(Script("namespace/enter"), ("bench:r",), ("x",), int)] * 2000)
    for strategy in LoadBalancingStrategy:
        pool = Pool.of(backend.namespace, pool_name(strategy, size))
        taken, given = [], []
        for _ in range(bench.rounds):
            tokens = [f"@bench:{next(_numbers)}" for _ in range(1000)]
            taken.append(
                _usec_per_call(client, backend, [commands.acquire(pool, token, 60_000, ANY) for token in tokens])
            )
            given.append(_usec_per_call(client, backend, [commands.release(pool, token) for token in tokens]))
        for what, figures, goal in (("acquire", taken, ACQUIRE_GOAL_US), ("release", given, RELEASE_GOAL_US)):
            figure = statistics.median(figures)
            yield Row(
                f"server time of {what}, {strategy.value}, {size:,} instances",
                f"{figure:.3g} us",
                f"a script of TIME and one ZADD: {bare:.3g} us",
                None,
                f"<= {goal:g} us",
                figure <= goal,
            )
    client.close()


def _usec_per_call(client: Any, backend: Backend, work: Sequence[Command[Any]]) -> float:
    run_all(backend, work[:1])
    client.config_resetstat()
    run_all(backend, work[1:])
    stats = client.info("commandstats")["cmdstat_evalsha"]
    return float(stats["usec"]) / float(stats["calls"])


def memory(bench: Bench, backend: Backend) -> Iterator[Row]:
    client: Any = bench.client()
    count = 5000
    pool = Pool.of(backend.namespace, "memory")

    def used() -> int:
        return sum(int(client.memory_usage(key, samples=0) or 0) for key in pool.keys.all)

    fleet = [AgentInstance(f"worker-{number}", "memory") for number in range(count)]
    run_all(backend, [commands.register(pool, fleet[number], None, 0) for number in range(count)])
    instances = used()
    token = backend.process
    run_all(backend, [commands.acquire(pool, f"@{token}:{number:x}", 3_600_000, ANY) for number in range(count)])
    for what, size in (("instance", instances / count), ("lease", (used() - instances) / count)):
        goal = MEMORY_GOAL_BYTES[what]
        yield Row(
            f"memory of an {what}" if what == "instance" else f"memory of a live {what}",
            f"{size:.0f} B",
            "",
            None,
            f"<= {goal:.0f} B",
            size <= goal,
        )
    client.close()


def hand_off(bench: Bench) -> Iterator[Row]:
    """From the release in one backend to the lease in another that stands in line."""
    giver, taker = Backend(bench.url), Backend(bench.url)
    first, second = LoadBalancer(backend=giver), LoadBalancer(backend=taker)
    first.register_instance(AgentInstance("one", "hand-off", max_capacity=1))
    times = []
    for _ in range(300 if bench.full else 80):
        instance = first.acquire("hand-off")
        served: list[float] = []

        def take(served: list[float] = served) -> None:
            with second.lease("hand-off", wait=30):
                served.append(time.perf_counter())

        thread = threading.Thread(target=take)
        thread.start()
        while not first.status("hand-off")[0].waiting:
            time.sleep(0.001)
        time.sleep(0.005)  # the waiter has asked, and sleeps
        start = time.perf_counter()
        first.release(instance)
        thread.join()
        times.append(served[0] - start)
    times.sort()
    for what, figure in (("median", statistics.median(times)), ("p99", times[int(len(times) * 0.99)])):
        yield Row(
            f"hand-off to who waits in line, {what}",
            f"{figure * 1e3:.3g} ms",
            "asking by itself: up to 1 s",
            None,
            "",
            None,
        )
    giver.close()
    taker.close()


def saturated(bench: Bench) -> Row:
    """What share of the capacity is in use while more callers wait than there are slots."""
    backend = Backend(bench.url)
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("one", "busy", max_capacity=SLOTS))
    seconds = 5.0 if bench.full else 2.0
    end = time.perf_counter() + seconds
    held: list[float] = []

    def work() -> None:
        while time.perf_counter() < end:
            with balancer.lease("busy", wait=30):
                start = time.perf_counter()
                time.sleep(HELD_S)
                held.append(max(0.0, min(end, time.perf_counter()) - start))

    threads = [threading.Thread(target=work) for _ in range(3 * SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.close()
    use = sum(held) / (SLOTS * seconds)
    return Row(
        f"use of {SLOTS} slots, each held {HELD_S * 1e3:.0f} ms, {3 * SLOTS} callers",
        f"{use:.1%}",
        "all of the time",
        use,
        f">= {USE_GOAL:.0%}",
        use >= USE_GOAL,
    )
