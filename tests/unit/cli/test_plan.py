"""Tests of plans: how they are read, and what they need, calculated by hand from given costs."""

from __future__ import annotations

import math

import pytest

from agentperf_redis.cli.plan import Cost, Costs, Plan, forecast, parsed_plan, plan_as_dict, plan_in_words
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.retention import Retention, memory_forecast

GIB = 2**30
COSTS = Costs(
    flush=Cost(100e-6, 1000, 30),
    agent=Cost(50e-6, 400, 0),
    execution=Cost(5e-6, 30, 0),
    read=Cost(10e-6, 100, 600),
    report=Cost(40e-6, 500, 20),
    reported=Cost(2e-6, 20, 0),
    put=Cost(60e-6, 1500, 30),
    acquire=Cost(50e-6, 450, 200),
    release=Cost(30e-6, 350, 5),
    entry_bytes=900.0,
    instance_bytes=400.0,
    lease_bytes=200.0,
)


def test_plan_is_read_with_its_defaults() -> None:
    plan = parsed_plan("agents=1000, rps=50,entries=1e6,value=500,instances=5000,acquires=2.5e3")
    assert plan == Plan(agents=1000, rps=50.0, entries=1_000_000, value=500, instances=5000, acquires=2500.0)
    assert plan.reads_per_second == 50.0
    assert plan.puts_per_second == pytest.approx(10.0)
    assert (plan.held, plan.processes, plan.memory) == (1.0, 16, None)
    assert plan_as_dict(plan)["reads"] == 50.0
    assert plan_in_words(plan)[1] == "1,000,000 entries of 500 bytes with 50 reads and 10 puts a second"


def test_reads_and_hits_can_be_given() -> None:
    plan = parsed_plan("entries=100,reads=400,hits=.75")
    assert (plan.reads_per_second, plan.puts_per_second) == (400.0, 100.0)
    assert parsed_plan("agents=1,rps=9").reads_per_second == 0.0  # this plan has no cache, so there are no reads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--plan is ''; allowed: <key>=<number>, with the keys agents, rps, entries"),
        ("agents", "--plan is 'agents'; allowed: <key>=<number>"),
        ("agents=5,agent=5", "--plan is 'agent=5'; allowed"),
        ("agents=5,agents=6", "each key once, and agents stands in it twice"),
        ("agents=two", "agents is 'two'; allowed: a whole number from 0 to 2000"),
        ("agents=2001", "agents is '2001'; allowed: a whole number from 0 to 2000"),
        ("agents=-1", "agents is '-1'; allowed"),
        ("agents=1.5", "agents is '1.5'; allowed: a whole number"),
        ("agents=nan", "agents is 'nan'; allowed"),
        ("agents=1_0", "agents is '1_0'; allowed"),
        ("agents=9,rps=inf", "rps is 'inf'; allowed: a number from 0 to 1e+07"),
        ("agents=9,rps=1e999", "rps is '1e999'; allowed"),
        ("entries=9,value=0", "value is '0'; allowed: a whole number from 1 to 1e+06"),
        ("entries=9,hits=80", "hits is '80'; allowed: a number from 0 to 1"),
        ("acquires=5", "acquires is 5.0; allowed: only together with instances"),
        ("agents=1,reads=5", "reads is 5.0; allowed: only together with entries"),
        ("entries=1,rps=5", "rps is 5.0; allowed: only together with agents"),
        ("processes=5", "a plan with agents, entries or instances"),
        ("entries=0", "a plan with agents, entries or instances"),
        ("entries=9,memory=5", "memory is '5'; allowed: a whole number from 1.04858e+06 to 1e+15"),
    ],
)
def test_faulty_plans_name_key_and_value(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parsed_plan(text)
    assert message in str(caught.value)


def test_pool_is_calculated_from_its_costs() -> None:
    found = forecast(Plan(instances=5000, acquires=2000, held=3), COSTS, 8 * GIB, Retention())
    assert found.pool.memory == 5000 * 400 + 6000 * 200
    assert found.pool.load == found.load
    assert found.load.cpu == pytest.approx(2000 * 80e-6)
    assert (found.load.received, found.load.sent) == (2000 * 800, 2000 * 205)
    assert (found.nodes, found.pool.shards, found.cache.shards, found.metrics.shards) == (1, 1, 1, 16)


def test_cache_is_calculated_from_its_costs() -> None:
    # A process sends a report every 0.2 s, or after 256 hits. The default is 16 processes. Together, they have
    # 16,000 * 0.75 = 12,000 hits a second. A process has only 150 hits in 0.2 s, so it sends one report every 0.2 s.
    found = forecast(Plan(entries=10**6, reads=16_000, hits=0.75), COSTS, 8 * GIB, Retention())
    assert found.memory == found.cache.memory == 10**6 * 900
    reports = 16 / 0.2
    expected = 16_000 * 10e-6 + 4000 * 60e-6 + reports * 40e-6 + (12_000 - reports) * 2e-6
    assert found.load.cpu == pytest.approx(expected, rel=1e-6)


def test_metrics_are_calculated_from_their_costs() -> None:
    # With so many executions, each process sends counts of all 100 agents every second. It sends one flush to each of
    # the 16 shards.
    found = forecast(Plan(agents=100, rps=1e5, processes=2), COSTS, 8 * GIB, Retention())
    expected = 32 * 100e-6 + (200 - 32) * 50e-6 + (1e5 - 200) * 5e-6
    assert found.load.cpu == pytest.approx(expected, rel=1e-6)
    assert found.memory == memory_forecast(Retention(), agents=100, per_second=1000).total
    # With one execution a second, each flush contains a single execution.
    found = forecast(Plan(agents=2000, rps=1, processes=1000), COSTS, 8 * GIB, Retention())
    assert found.load.cpu == pytest.approx(100e-6, rel=1e-3)
    assert forecast(Plan(agents=5), COSTS, GIB, Retention()).memory == 0


@pytest.mark.parametrize(
    ("acquires", "nodes", "shards"),
    [
        # An acquire and its release take 80 us, and a node has a capacity of half a core. A single node has one shard.
        # A Cluster has at least 3 nodes, and a shard takes at most a quarter of a node. The number of shards is a power
        # of two.
        (6250, 1, 1),  # the load fills exactly one node
        (6400, 3, 8),  # the load fills 1.02 nodes, or 4.1 quarters
        (25_000, 4, 16),  # the load fills 4 nodes, or 16 quarters
        (25_100, 5, 32),
    ],
)
def test_nodes_and_shards_follow_the_server_time(acquires: int, nodes: int, shards: int) -> None:
    found = forecast(Plan(instances=10, acquires=acquires), COSTS, 8 * GIB, Retention())
    assert (found.nodes, found.pool.shards) == (nodes, shards)
    assert found.cache.shards == 1
    assert not found.notes


def test_nodes_and_shards_follow_the_memory() -> None:
    plan = Plan(entries=10**7)
    # The entries take 9 GB. This is 75% of the node's 12 GB, and 75% is the maximum share (MAX_MEMORY_SHARE).
    assert forecast(plan, COSTS, 12 * 10**9, Retention()).nodes == 1
    found = forecast(plan, COSTS, 2 * 10**9, Retention())
    assert (found.nodes, found.cache.shards, found.pool.shards) == (6, 32, 1)
    assert forecast(Plan(entries=10**7, memory=2 * 10**9), COSTS, 99 * GIB, Retention()) == found


def test_limits_that_a_plan_exceeds_are_noted() -> None:
    found = forecast(Plan(instances=9, acquires=1e6), COSTS, GIB, Retention())
    assert found.pool.shards == 256
    assert found.notes == ("the pool would need 1024 shards, and 256 is the maximum: use several pools",)
    (note,) = forecast(Plan(entries=100, reads=1e5), COSTS, GIB, Retention()).notes
    assert note == "a shard of a cache needs at least 250 entries: use several caches"
    (note,) = forecast(Plan(agents=2000, rps=1e6), COSTS, 64 * GIB, Retention()).notes
    assert note.startswith("the metrics have 16 shards")


def test_further_parts_never_cost_less_than_nothing() -> None:
    assert Cost(3.0, 40, 9).above(Cost(1.0, 20, 10), 2) == Cost(1.0, 10, 0)
    assert math.isclose((Cost(1.0, 2, 3) * 2 + Cost(1.0, 0, 0)).cpu, 3.0)
