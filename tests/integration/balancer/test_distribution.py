"""The distribution of work that each strategy promises, with fixed seeds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from agentperf_redis import random_numbers
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancingStrategy, Outcome, commands
from agentperf_redis.balancer.commands import Choice, Granted, Pool
from agentperf_redis.command import Batch, Command
from tests.support.servers import Raw, wait_until

RARE_Z = 3.72
"""A standard normal variable exceeds this value with a probability of 10^-4."""
PIPELINE = 500


def run_all(backend: Backend, work: Sequence[Command[Any]]) -> list[Any]:
    results: list[Any] = []
    for at in range(0, len(work), PIPELINE):
        results += backend.run(Batch(tuple(work[at : at + PIPELINE])))
    return results


def fill(backend: Backend, name: str, strategy: LoadBalancingStrategy, instances: Sequence[AgentInstance]) -> Pool:
    pool = Pool.of(backend.namespace, name)
    run_all(backend, [commands.register(pool, instance, strategy, 0) for instance in instances])
    return pool


def fleet(count: int, **facts: Any) -> list[AgentInstance]:
    return [AgentInstance(f"p{number}", "t", **facts) for number in range(count)]


def acquire(backend: Backend, pool: Pool, count: int, prefix: str, choice: Choice = commands.ANY) -> list[str]:
    """Acquire `count` leases one after the other; return the names of their instances."""
    work = [commands.acquire(pool, f"@{prefix}{number}", 3_600_000, choice) for number in range(count)]
    granted = run_all(backend, work)
    assert all(isinstance(answer, Granted) for answer in granted)
    return [answer.facts[0] for answer in granted]


def loads(backend: Backend, pool: Pool) -> dict[str, tuple[int, int, float]]:
    page = backend.run(commands.status(pool, 0, 100_000))
    assert page is not None
    seen = [status.instance for status in page.instances]
    return {each.id: (each.current_load, each.max_capacity, each.weight) for each in seen}


def chi_square_deviate(observed: Counter[str], shares: dict[str, float], draws: int) -> float:
    """Convert the chi-square statistic to a standard normal deviate (Wilson and Hilferty 1931)."""
    total = sum(shares.values())
    expected = {name: share / total * draws for name, share in shares.items() if share > 0}
    assert set(observed) <= set(expected)
    chi = sum((observed[name] - number) ** 2 / number for name, number in expected.items())
    degrees = len(expected) - 1
    return float(((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees)))


def leased_and_released(backend: Backend, pool: Pool, times: int) -> Counter[str]:
    """Acquire and release a lease `times` times, so that each pick sees the same loads; return the picks."""
    work: list[Command[Any]] = []
    for number in range(times + 1):
        token = f"@draw{number}"
        work += [commands.acquire(pool, token, 3_600_000, commands.ANY), commands.release(pool, token)]
    # The first two commands run alone, and load the scripts. If the server did not know the script of a command in a
    # batch, the command would be sent again and run after later commands.
    for command in work[:2]:
        backend.run(command)
    answers = run_all(backend, work[2:])
    assert all(answers[1::2]), "one was not released"
    return Counter(granted.facts[0] for granted in answers[::2])


@pytest.mark.thorough
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3, 4, 5), (100, 1, 1, 1, 0.01, 0), (5, 1) * 40])
@pytest.mark.parametrize("leased", [0, 0.5])
def test_weighted_draws_by_weight_and_free_share(backend: Backend, weights: tuple[float, ...], leased: float) -> None:
    random_numbers.seed(20_261_122)
    instances = [AgentInstance(f"p{n}", "t", 0, 10, weight) for n, weight in enumerate(weights)]
    pool = fill(backend, "t", LoadBalancingStrategy.WEIGHTED, instances)
    usable = sum(weight > 0 for weight in weights)
    acquire(backend, pool, int(usable * 10 * leased), "held")
    shares = {name: weight * (1 - load / cap) for name, (load, cap, weight) in loads(backend, pool).items()}
    if leased:
        assert len({load for load, _, _ in loads(backend, pool).values()}) > 1, "the loads should be unequal"

    draws = 6_000
    assert chi_square_deviate(leased_and_released(backend, pool, draws), shares, draws) < RARE_Z
    peeks = run_all(backend, [commands.select(pool, commands.ANY) for _ in range(draws)])
    assert chi_square_deviate(Counter(each.id for each in peeks), shares, draws) < RARE_Z


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", [LoadBalancingStrategy.RANDOM, LoadBalancingStrategy.WEIGHTED])
def test_draws_from_many_instances_are_even(backend: Backend, strategy: LoadBalancingStrategy) -> None:
    random_numbers.seed(7)
    pool = fill(backend, "t", strategy, fleet(500))
    draws = 20_000
    picked = run_all(backend, [commands.select(pool, commands.ANY) for _ in range(draws)])
    even = {f"p{number}": 1.0 for number in range(500)}
    assert chi_square_deviate(Counter(each.id for each in picked), even, draws) < RARE_Z


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_pick_is_the_same_if_the_caller_names_no_strategy(strategy: LoadBalancingStrategy, backend: Backend) -> None:
    """Acquire expects a strategy before it has read the pool's. A wrong expectation does not change the pick."""
    picks = []
    for name, choice in (("named", Choice(strategy)), ("unnamed", commands.ANY)):
        pool = fill(backend, name, strategy, [replace(each, weight=1.0 + n) for n, each in enumerate(fleet(7))])
        draws, chance = [], random.Random(strategy.value)
        for number in range(30):
            command = commands.acquire(pool, f"@{number}", 3_600_000, choice)
            drawn = {"random": chance.getrandbits(52), "point": chance.getrandbits(48)}
            assert isinstance(command.args, dict)
            draws.append(replace(command, args={**command.args, **drawn}))
        picks.append([granted.facts[0] for granted in run_all(backend, draws)])
    assert picks[0] == picks[1]


def test_least_loaded_keeps_equal_instances_within_one(backend: Backend) -> None:
    pool = fill(backend, "t", LoadBalancingStrategy.LEAST_LOADED, fleet(30, max_capacity=8))
    for batch in range(24):
        acquire(backend, pool, 10, f"{batch}-")
        each = [load for load, _, _ in loads(backend, pool).values()]
        assert max(each) - min(each) <= 1
    assert set(each) == {8}


def test_least_loaded_fills_by_share_of_capacity(backend: Backend) -> None:
    instances = [AgentInstance("small", "t", max_capacity=2), AgentInstance("large", "t", max_capacity=20)]
    pool = fill(backend, "t", LoadBalancingStrategy.LEAST_LOADED, instances)
    assert Counter(acquire(backend, pool, 11, "a")) == {"small": 1, "large": 10}


@pytest.mark.thorough
# A Cluster is left out, because it cannot copy keys between slots. The strategy is the same on every kind of server.
@pytest.mark.servers("valkey", "redis82", "redis70")
def test_power_of_two_keeps_maximum_load_low(backend: Backend, raw: Raw) -> None:
    empty = fill(backend, "t", LoadBalancingStrategy.POWER_OF_TWO, fleet(1000, max_capacity=100)).keys
    worst = []
    for seed in range(20):
        random_numbers.seed(seed)  # the scripts get random numbers from Python, so every server gives the same result
        pool = Pool.of(backend.namespace, f"t{seed}")
        raw.copy(empty.state, pool.keys.state)
        raw.copy(empty.ready, pool.keys.ready)
        worst.append(max(Counter(acquire(backend, pool, 4000, "a")).values()))
    assert max(worst) <= 7


def test_peak_ewma_prefers_the_faster_instance(backend: Backend) -> None:
    random_numbers.seed(1)
    pool = fill(backend, "t", LoadBalancingStrategy.PEAK_EWMA, fleet(2, max_capacity=1000))
    for number in range(40):
        (name,) = acquire(backend, pool, 1, f"warm{number}-")
        took = 0.1 if name == "p0" else 0.4
        token = f"@warm{number}-0"
        assert backend.run(commands.release(pool, token, name, outcome=Outcome.OK, response_time=took))
    picked = Counter(acquire(backend, pool, 200, "a"))
    assert picked["p0"] > 2 * picked["p1"] > 0


def homes(backend: Backend, pool: Pool, keys: Sequence[str]) -> dict[str, str]:
    picked = run_all(backend, [commands.select(pool, Choice(affinity=key)) for key in keys])
    return {key: each.id for key, each in zip(keys, picked, strict=True)}


def test_consistent_hash_moves_keys_only_for_changed_instance(backend: Backend) -> None:
    strategy = LoadBalancingStrategy.CONSISTENT_HASH
    pool = fill(backend, "t", strategy, fleet(20, max_capacity=100))
    keys = [f"session-{number}" for number in range(1000)]
    before = homes(backend, pool, keys)
    assert len(set(before.values())) == 20

    backend.run(commands.register(pool, AgentInstance("new", "t", max_capacity=100), strategy, 0))
    with_new = homes(backend, pool, keys)
    moved = {key for key in keys if before[key] != with_new[key]}
    assert 0 < len(moved) < 150
    assert {with_new[key] for key in moved} == {"new"}

    assert backend.run(commands.remove(pool, "new"))
    assert homes(backend, pool, keys) == before
    assert backend.run(commands.remove(pool, "p7"))
    without = homes(backend, pool, keys)
    assert {before[key] for key in keys if before[key] != without[key]} == {"p7"}


@pytest.mark.parametrize("sessions", [1, pytest.param(3, marks=pytest.mark.thorough), 50])
def test_consistent_hash_never_exceeds_its_bound(backend: Backend, sessions: int) -> None:
    pool = fill(backend, "t", LoadBalancingStrategy.CONSISTENT_HASH, fleet(100, max_capacity=50))
    for number in range(20):
        choice = Choice(affinity=f"session-{number % sessions}")
        acquire(backend, pool, 50, f"{number}-", choice)
        total = 50 * (number + 1)
        bound = math.ceil(1.25 * total / 100)
        assert max(load for load, _, _ in loads(backend, pool).values()) <= bound


@pytest.mark.parametrize("require", [frozenset(), frozenset({"gpu"}), frozenset({"gpu", "fr"})])
@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_waiters_spread_over_all_freed_instances(
    backend: Backend, strategy: LoadBalancingStrategy, require: frozenset[str]
) -> None:
    pool = Pool.of(backend.namespace, "t")
    instances = fleet(40, max_capacity=100, labels=frozenset({"gpu", "fr"}))
    run_all(backend, [commands.register(pool, instance, strategy, 1) for instance in instances])
    wait_until(
        lambda: backend.run(commands.select(pool, commands.ANY)) is None, "all instances to miss their heartbeat"
    )
    waits = [
        commands.wait(pool, f"@{number}", ttl_ms=60_000, live_ms=60_000, boost_ms=0, require=require, position="-")
        for number in range(60)
    ]
    assert not [answer for answer in run_all(backend, waits) if isinstance(answer, Granted)]
    awake = ["p7", "p23", "p31"]
    assert backend.run(commands.heartbeat(pool, awake, 60_000)) == []
    granted = [answer.facts[0] for answer in run_all(backend, waits)]
    assert len(granted) == len(waits)
    assert set(granted) == set(awake)
