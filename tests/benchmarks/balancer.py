"""Benchmarks of the balancer: acquire and release, the queue, server time and memory.

Acquire and release are measured at several pool sizes under every strategy. Server time is the time spent in
scripts, as counted by the server. Other load on the machine can only lengthen this time, so the first decile of many
short rounds is shown. If a Redis 7 is installed on the machine, server time is measured on that server too.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import redis

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy, Outcome, commands
from agentperf_redis.balancer.commands import ANY, Choice, Granted, Pool
from agentperf_redis.command import Batch, Command
from agentperf_redis.script import Script
from tests.benchmarks import health, least_busy
from tests.benchmarks.measure import Bench, Row, Work, first_decile, micros, processor_times
from tests.support.servers import Server, program

SIZES = (10, 1000, 10_000)
LIVE_LEASES = 10_000
WARM_UP = 500
"""Number of acquire and release pairs before the first measurement.

Without these pairs, the first row would include one-time setup and the wake-up of the processor.
"""
SLOTS, HELD_S = 10, 0.2
PAIR_GOAL, HASH_PAIR_GOAL, SIZE_GOAL = 2.3, 2.0, 1.3
CORES_GOAL = {1: 1.8, 2: 1.4}
"""Maximum ratio for the default strategy, by the number of cores that client and server have together."""
ACQUIRE_GOAL_US, RELEASE_GOAL_US = {"Valkey": 25.0, "Redis 7": 30.0}, 20.0
CHOOSY_ACQUIRE_GOAL_US = 30.0
CHOOSY = (
    LoadBalancingStrategy.WEIGHTED,
    LoadBalancingStrategy.PEAK_EWMA,
    LoadBalancingStrategy.CONSISTENT_HASH,
)
"""The strategies that read more than one instance or index entry for a pick."""
USE_GOAL = 0.9
LEAST_BUSY_GOALS = {10: 5, 1000: 50}
MEMORY_GOAL_BYTES = {
    "Valkey": {"instance": 345, "lease": 1.3 * 166},
    "Redis 7": {"instance": 430, "lease": 1.3 * 250},
}
"""Maximum bytes of an instance and of a lease, for each kind of server.

When records had no field names, an instance took 228 bytes (Valkey) and 311 bytes (Redis 7). The goals allow for the
names.
"""
BARE = Script("bare", "return 1")
"""A script that does nothing. With the same keys and arguments, it shows the fixed cost of a call."""
PIPELINED = 100
SERVER_CALLS = 100

_numbers = itertools.count()


def rows(bench: Bench) -> Iterator[Row]:
    """Yield all rows of the balancer."""
    backend = Backend(bench.url)
    for strategy in LoadBalancingStrategy:
        for size in SIZES:
            fill(backend, strategy, size)
        if strategy is next(iter(LoadBalancingStrategy)):
            pairs(LoadBalancer(backend=backend), pool_name(strategy, SIZES[0]))(WARM_UP)
        yield against_bare_scripts(bench, backend, strategy)
        for size in SIZES[1:]:
            yield against_small(bench, backend, strategy, size)
    yield from on_cores(bench, backend)
    yield from against_least_busy(bench, backend)
    yield from server_time(bench, backend, "Valkey")
    yield from server_time_on_redis(bench)
    yield from memory(bench, backend, "Valkey")
    yield from hand_off(bench)
    yield saturated(bench)
    yield from health.on_health(bench, backend)
    backend.close()


def times(bench: Bench) -> int:
    """Return the number of acquire and release pairs per round."""
    return 300 if bench.full else 150


def pool_name(strategy: LoadBalancingStrategy, size: int) -> str:
    return f"{strategy.value}-{size}"


def run_all(backend: Backend, work: Sequence[Command[Any]]) -> list[Any]:
    replies: list[Any] = []
    for at in range(0, len(work), PIPELINED):
        replies += backend.run(Batch(tuple(work[at : at + PIPELINED])))
    return replies


def fill(backend: Backend, strategy: LoadBalancingStrategy, size: int) -> Pool:
    """Register instances with unequal weights, and lease a third of their capacity."""
    name = pool_name(strategy, size)
    pool = Pool.of(backend.namespace, name)
    fleet = [AgentInstance(f"i{number}", name, 0, 100, 1.0 + number % 5) for number in range(size)]
    run_all(backend, [commands.register(pool, instance, strategy, 0) for instance in fleet])
    run_all(
        backend,
        [commands.acquire(pool, f"@held:{number}", 3_600_000, ANY) for number in range(min(size * 30, LIVE_LEASES))],
    )
    return pool


def pairs(balancer: LoadBalancer, name: str) -> Work:
    def work(times: int) -> None:
        for _ in range(times):
            balancer.release(balancer.acquire(name))

    return work


def blocks(balancer: LoadBalancer, name: str) -> Work:
    """Return work that holds a lease for an empty `with` block."""

    def work(times: int) -> None:
        for _ in range(times):
            with balancer.lease(name):
                pass

    return work


def against_bare_scripts(bench: Bench, backend: Backend, strategy: LoadBalancingStrategy) -> Row:
    ours = pairs(LoadBalancer(backend=backend), pool_name(strategy, 10))
    goal = HASH_PAIR_GOAL if strategy is LoadBalancingStrategy.CONSISTENT_HASH else PAIR_GOAL
    return _against_two_calls(bench, f"acquire + release, {strategy.value}, 10 instances", ours, goal)


def _against_two_calls(bench: Bench, name: str, ours: Work, goal: float) -> Row:
    with closing(bench.client()) as client:
        pair = bench.pair(ours, two_calls(client), times(bench))
    reference = f"two bare EVALSHA {micros(pair.reference_s)}"
    return Row(name, micros(pair.ours_s), reference, pair.ratio, f"<= {goal} x", pair.ratio <= goal)


def two_calls(client: redis.Redis) -> Work:
    """Return the work that any acquire and release need at least: two scripts, each sent on its own."""
    sha = client.script_load("return 1")

    def bare(times: int) -> None:
        for _ in range(times):
            client.evalsha(sha, 0)
            client.evalsha(sha, 0)

    return bare


def on_cores(bench: Bench, backend: Backend) -> Iterator[Row]:
    """Measure the default strategy with client and server on one core, and on one core each.

    On two cores, the time to wake the other core hides part of the cost, and it differs between machines.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with closing(bench.client()) as client:
        server: int = client.info("server")["process_id"]
    balancer, name = LoadBalancer(backend=backend), pool_name(LoadBalancingStrategy.LEAST_LOADED, 10)
    available = sorted(os.sched_getaffinity(0) & os.sched_getaffinity(server))
    for cores, goal in CORES_GOAL.items():
        if len(available) < cores:
            continue
        where = "one core" if cores == 1 else f"{cores} cores"
        with _pinned({0: available[0], server: available[cores - 1]}):
            for what, work in (("acquire + release", pairs), ("with lb.lease", blocks)):
                yield _against_two_calls(bench, f"{what}, least loaded of 10, {where}", work(balancer, name), goal)
            if cores == 1:
                yield from _processor_times(bench, pairs(balancer, name))


def _processor_times(bench: Bench, ours: Work) -> Iterator[Row]:
    """Measure how the processor time of a pair is divided: the part of the server bounds what a better client saves."""
    with closing(bench.client()) as client:
        mine, theirs = (processor_times(work, client, 10 * times(bench)) for work in (ours, two_calls(client)))
    for what, one, other in zip(("client", "server"), mine, theirs, strict=True):
        yield Row(
            f"  processor time of the {what}", micros(one), f"two bare EVALSHA {micros(other)}", one / other, "", None
        )


@contextmanager
def _pinned(cores: dict[int, int]) -> Iterator[None]:
    """Bind each process to one core during the block."""
    before = {process: os.sched_getaffinity(process) for process in cores}
    try:
        for process, core in cores.items():
            os.sched_setaffinity(process, {core})
        yield
    finally:
        for process, earlier in before.items():
            os.sched_setaffinity(process, earlier)


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


def against_least_busy(bench: Bench, backend: Backend) -> Iterator[Row]:
    """Compare acquire and release with litellm's router. The router picks a deployment and counts calls in Redis."""
    for size, goal in LEAST_BUSY_GOALS.items():
        what = f"acquire + release, least_loaded, {size:,} instances"
        if not least_busy.installed():
            yield Row(what, "", "litellm's least-busy: not installed", None, f"<= 1/{goal} x", None)
            continue
        ours = pairs(LoadBalancer(backend=backend), pool_name(LoadBalancingStrategy.LEAST_LOADED, size))
        theirs, rounds = least_busy.calls(bench.url, size), 100 if bench.full else 30
        pair = bench.pair(ours, theirs, rounds)
        reference = f"litellm's least-busy: {micros(pair.reference_s)}"
        yield Row(what, micros(pair.ours_s), reference, pair.ratio, f"<= 1/{goal} x", pair.ratio <= 1 / goal)
        with closing(bench.client()) as client:
            limit = bench.pair(two_calls(client), theirs, rounds)
        reference = f"litellm's least-busy: {micros(limit.reference_s)}"
        yield Row(
            f"  limit: two bare EVALSHA, {size:,} instances", micros(limit.ours_s), reference, limit.ratio, "", None
        )


def server_time_on_redis(bench: Bench) -> Iterator[Row]:
    """Measure server time and memory on the Redis 7 of this machine, if one is installed."""
    if program("redis70") is None:
        yield Row("server time on Redis 7", "", "not installed", None, "", None)
        return
    server = Server("redis70")
    try:
        with closing(Backend(server.url)) as backend:
            for strategy in LoadBalancingStrategy:
                fill(backend, strategy, SIZES[-1])
            yield from server_time(Bench(server.url, bench.full), backend, "Redis 7")
            yield from memory(Bench(server.url, bench.full), backend, "Redis 7")
    finally:
        server.stop()


def server_time(bench: Bench, backend: Backend, kind: str) -> Iterator[Row]:
    """Measure the server time of acquire and release in the largest pool, which has live leases.

    The calls are pipelined, and name the strategy of the pool.
    """
    client: Any = bench.client()
    for strategy in LoadBalancingStrategy:
        pool = Pool.of(backend.namespace, pool_name(strategy, SIZES[-1]))
        bare, acquired, released = [], [], []
        for _ in range(8 * bench.rounds):
            tokens = [f"@bench:{next(_numbers)}" for _ in range(SERVER_CALLS)]
            acquires = [commands.acquire(pool, token, 60_000, Choice(strategy)) for token in tokens]
            bare.append(_usec_per_call(client, backend, [Command(BARE, a.keys, a.args, bool) for a in acquires])[0])
            figure, granted = _usec_per_call(client, backend, acquires)
            acquired.append(figure)
            held = zip(tokens, granted, strict=True)
            released.append(_usec_per_call(client, backend, [_release(pool, *each) for each in held])[0])
        compared = first_decile(bare)
        acquire_goal = CHOOSY_ACQUIRE_GOAL_US if strategy in CHOOSY else ACQUIRE_GOAL_US[kind]
        for what, figures, goal in (("acquire", acquired, acquire_goal), ("release", released, RELEASE_GOAL_US)):
            figure = first_decile(figures)
            yield Row(
                f"server time of {what}, {strategy.value}, {kind}",
                f"{figure:.3g} us",
                f"`return 1`, same arguments: {compared:.3g} us",
                figure / compared,
                f"<= {goal:g} us",
                figure <= goal,
            )
    client.close()


def _release(pool: Pool, token: str, granted: Granted) -> Command[bool]:
    """Return a release command like that of `lb.lease`: it passes the instance, the outcome ok and a response time."""
    return commands.release(pool, token, granted.facts[0], outcome=Outcome.OK, response_time=0.01)


def _usec_per_call(client: Any, backend: Backend, work: Sequence[Command[Any]]) -> tuple[float, list[Any]]:
    """Return the server's microseconds per call, and all replies.

    The first call is not measured, because it may also send the script.
    """
    replies = run_all(backend, work[:1])
    client.config_resetstat()
    replies += run_all(backend, work[1:])
    stats = client.info("commandstats")["cmdstat_evalsha"]
    return float(stats["usec"]) / float(stats["calls"]), replies


def memory(bench: Bench, backend: Backend, kind: str) -> Iterator[Row]:
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
        goal = MEMORY_GOAL_BYTES[kind][what]
        yield Row(
            f"memory of an {what}, {kind}" if what == "instance" else f"memory of a live {what}, {kind}",
            f"{size:.0f} B",
            "",
            None,
            f"<= {goal:.0f} B",
            size <= goal,
        )
    client.close()


def hand_off(bench: Bench) -> Iterator[Row]:
    """Measure the time from a release in one backend until a waiter in another backend has a lease."""
    sender, taker = Backend(bench.url), Backend(bench.url)
    first, second = LoadBalancer(backend=sender), LoadBalancer(backend=taker)
    first.register_instance(AgentInstance("one", "hand-off", max_capacity=1))
    times = []
    for _ in range(300 if bench.full else 80):
        instance = first.acquire("hand-off")
        granted_at: list[float] = []

        def take(granted_at: list[float] = granted_at) -> None:
            with second.lease("hand-off", wait=30):
                granted_at.append(time.perf_counter())

        thread = threading.Thread(target=take)
        thread.start()
        while not first.status("hand-off")[0].waiting:
            time.sleep(0.001)
        time.sleep(0.005)  # enough time for the queued waiter to go to sleep
        start = time.perf_counter()
        first.release(instance)
        thread.join()
        times.append(granted_at[0] - start)
    times.sort()
    for what, figure in (("median", statistics.median(times)), ("p99", times[int(len(times) * 0.99)])):
        yield Row(
            f"grant to a waiter in the queue, {what}",
            f"{figure * 1e3:.3g} ms",
            "polling: up to 1 s",
            None,
            "",
            None,
        )
    sender.close()
    taker.close()


def saturated(bench: Bench, shards: int = 1) -> Row:
    """Measure the share of the capacity that is in use while there are more callers than slots.

    In a pool with several shards, each slot is an instance of its own, so that most shards get a slot.
    """
    backend = Backend(bench.url)
    balancer = LoadBalancer(backend=backend)
    if shards == 1:
        balancer.register_instance(AgentInstance("one", "busy", max_capacity=SLOTS))
    else:
        balancer.configure_pool("busy", shards=shards)
        for number in range(SLOTS):
            balancer.register_instance(AgentInstance(f"one-{number}", "busy", max_capacity=1))
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
        f"use of {SLOTS} slots, each held {HELD_S * 1e3:.0f} ms, {3 * SLOTS} callers"
        + f", {shards} shards" * (shards > 1),
        f"{use:.1%}",
        "all of the time",
        use,
        f">= {USE_GOAL:.0%}",
        use >= USE_GOAL,
    )
