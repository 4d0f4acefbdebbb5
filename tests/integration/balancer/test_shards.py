"""Pools with several shards: every operation covers all shards, and no instance is leased beyond its capacity."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import (
    AgentInstance,
    EventKind,
    InstanceState,
    Lease,
    LoadBalancer,
    LoadBalancingStrategy,
    PoolSettings,
)
from agentperf_redis.balancer.commands import Division, Pool, Rates
from agentperf_redis.balancer.history import sample
from agentperf_redis.balancer.layouts import layouts_of
from agentperf_redis.balancer.lease_keeper import lease_keeper_of
from agentperf_redis.balancer.registrations import Registered, registration
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable, CorruptState, InvalidArgument, LeaseLost, NoCapacity
from tests.support import records
from tests.support.calls import Call
from tests.support.servers import TIMEOUT, Raw, Server, Servers, wait_until
from tests.support.stalls import hurry
from tests.support.workers import Workers

Connect = Callable[..., Backend]
SHARDS = 4
FLEET = 12


@pytest.fixture(autouse=True)
def kept() -> Iterator[list[Any]]:
    """A list that keeps leases until the backends are closed. Otherwise, they would be released with a warning."""
    held: list[Any] = []
    yield held
    held.clear()


@pytest.fixture
def balancer(backend: Backend) -> LoadBalancer:
    return divided(LoadBalancer(backend=backend))


@pytest.fixture
def newcomer(server: Server, connect: Connect) -> LoadBalancer:
    """A balancer of a process that does not know the number of shards."""
    return LoadBalancer(backend=connect(server.url))


def divided(balancer: LoadBalancer, capacity: int = 2, count: int = FLEET, **facts: Any) -> LoadBalancer:
    balancer.configure_pool("planner", shards=SHARDS)
    for number in range(count):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=capacity, **facts))
    return balancer


def shards(namespace: str, count: int = SHARDS) -> list[keys.PoolKeys]:
    return [keys.pool(namespace, "planner", number, count) for number in range(count)]


def held(raw: Raw, namespace: str) -> list[str]:
    return [token for pool in shards(namespace) for token in records.held(raw.hgetall(pool.state))]


def shard_of(balancer: LoadBalancer, instance_id: str, agent_type: str = "planner") -> Pool:
    backend = balancer._operations.backend
    return layouts_of(backend).of(Pool.of(backend.namespace, agent_type)).home(instance_id)


def test_instances_lie_in_one_shard_each(balancer: LoadBalancer, raw: Raw, namespace: str) -> None:
    found = [name for pool in shards(namespace) for name in raw.zrange(pool.ids, 0, -1)]
    assert sorted(found) == sorted(f"p{number}" for number in range(FLEET))
    assert raw.hget(keys.pool(namespace, "planner").state, "#pool") == f"shards={SHARDS} strategy=least_loaded"
    assert raw.zcard(keys.pool(namespace, "planner").ids) == 0


def test_all_units_are_leased_and_no_more(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    found = [call(each, "acquire", "planner") for _ in range(FLEET) for each in (balancer, newcomer)]
    assert Counter(each.id for each in found) == {f"p{number}": 2 for number in range(FLEET)}
    assert call(newcomer, "acquire", "planner") is None
    assert call(newcomer, "select_instance", "planner") is None
    with pytest.raises(NoCapacity, match="of 12 instances, 12 full"), call.inside(newcomer, "lease", "planner"):
        raise AssertionError
    assert len(held(raw, namespace)) == 2 * FLEET
    assert all(call(balancer, "release", each) for each in found[::2])
    assert call(newcomer, "release_many", found[1::2]) == [True] * FLEET
    assert held(raw, namespace) == []


def test_leases_are_renewed_and_lost_in_their_shards(
    call: Call, balancer: LoadBalancer, raw: Raw, kept: list[Any]
) -> None:
    found = [call(balancer, "acquire", "planner", ttl=0.3) for _ in range(6)]
    kept.append(found)
    due = {each.lease.token: each.lease.pool.keys.due for each in found}
    assert len(set(due.values())) > 1
    before = {token: raw.zscore(key, token) for token, key in due.items()}
    wait_until(lambda: all((raw.zscore(due[t], t) or 0) > at for t, at in before.items()), "all to be renewed")
    assert call(balancer, "release_token", "planner", found[0].lease.token)
    wait_until(lambda: found[0].lease.lost is not None, "the loss to be noticed")
    with pytest.raises(LeaseLost):
        found[0].lease.check()


def test_acquire_many_takes_from_all_shards(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    assert call(newcomer, "acquire_many", "planner", 2 * FLEET + 1, all_or_none=True) == []
    wait_until(lambda: held(raw, namespace) == [], "the leases of the failed attempt to be given back")
    some = call(newcomer, "acquire_many", "planner", FLEET)
    assert Counter(each.id for each in some).most_common(1)[0][1] <= 2
    rest = call(balancer, "acquire_many", "planner", FLEET + 5)
    assert len(rest) == FLEET
    assert Counter(each.id for each in some + rest) == {f"p{number}": 2 for number in range(FLEET)}
    assert call(balancer, "acquire_many", "planner", 1) == []
    assert call(balancer, "release_many", rest) == [True] * FLEET
    everything = call(balancer, "acquire_many", "planner", FLEET, all_or_none=True)
    assert len(everything) == FLEET
    call(balancer, "release_many", everything)
    call(newcomer, "release_many", some)


@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_every_strategy_works_over_shards(call: Call, backend: Backend, strategy: LoadBalancingStrategy) -> None:
    balancer = divided(LoadBalancer(strategy, backend=backend), capacity=1)
    found = [call(balancer, "acquire", "planner", affinity=f"{number}") for number in range(FLEET)]
    assert len({each.id for each in found}) == FLEET
    call(balancer, "release_many", found)
    (status,) = balancer.status("planner")
    assert status.strategy is strategy


def test_affinity_leads_to_the_same_instance(call: Call, backend: Backend, newcomer: LoadBalancer) -> None:
    balancer = divided(LoadBalancer("consistent_hash", backend=backend), capacity=10)
    for session in ("a", "b", "c", "d", "e"):
        names = set()
        for each in (balancer, newcomer, balancer):
            instance = call(each, "acquire", "planner", affinity=session)
            names.add(instance.id)
            call(each, "release", instance)
        assert len(names) == 1


def test_labels_are_found_in_any_shard(call: Call, balancer: LoadBalancer, newcomer: LoadBalancer) -> None:
    balancer.register_instance(AgentInstance("g0", "planner", max_capacity=1, labels=frozenset({"gpu"})))
    instance = call(newcomer, "acquire", "planner", require={"gpu"})
    assert instance.id == "g0"
    with pytest.raises(NoCapacity, match="of 1 instance with the label 'gpu', 1 full"):
        call.inside(newcomer, "lease", "planner", require={"gpu"}).__enter__()
    call(newcomer, "release", instance)


def test_changes_reach_the_home_of_the_instance(call: Call, balancer: LoadBalancer, newcomer: LoadBalancer) -> None:
    names = [f"p{number}" for number in range(FLEET)]
    assert call(newcomer, "update_instance", "planner", "p3", max_capacity=7)
    assert call(newcomer, "drain", "planner", "p4")
    assert call(newcomer, "mark_unhealthy", "planner", "p5")
    assert call(newcomer, "cool_down", "planner", "p6", 60)
    assert call(newcomer, "heartbeat", "planner", *names, "p99") == ["p99"]
    assert call(newcomer, "wait_until_idle", "planner", "p4", wait=0)
    assert not call(newcomer, "update_instance", "planner", "p99", max_capacity=7)
    assert call(newcomer, "remove_instance", "planner", "p7")
    assert not call(newcomer, "remove_instance", "planner", "p7")
    (status,) = call(newcomer, "status", "planner")
    states = {each.instance.id: each.state for each in status.instances}
    assert set(states) == set(names) - {"p7"}
    assert status.total_capacity == 2 * (FLEET - 2) + 7
    expected = {"p4": InstanceState.DRAINING, "p5": InstanceState.UNHEALTHY, "p6": InstanceState.RESTING}
    assert {name: state for name, state in states.items() if state is not InstanceState.UP} == expected
    for name in ("p4", "p5", "p6"):
        call(newcomer, "undrain", "planner", name)
        call(newcomer, "mark_healthy", "planner", name)
    assert all(each.state is InstanceState.UP for each in balancer.status("planner")[0].instances)


def test_reads_show_all_shards_as_one_pool(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str, kept: list[Any]
) -> None:
    found = call(newcomer, "acquire_many", "planner", 2 * FLEET)
    kept.append(found)
    waiting = threading.Thread(target=lambda: kept.append(balancer.acquire("planner", wait=TIMEOUT)))
    waiting.start()
    wait_until(lambda: call(newcomer, "leases", "planner").waiters != (), "the waiter to queue")
    leases = call(newcomer, "leases", "planner")
    assert {each.token for each in leases.leases} == {each.lease.token for each in found}
    (status,) = call(newcomer, "status")
    assert (status.current_load, status.waiting, status.granted) == (2 * FLEET, 1, 2 * FLEET)
    assert status.shards == SHARDS
    assert call(newcomer, "get_status")["planner"]["instances"] == FLEET
    events = call(newcomer, "events", "planner")
    assert Counter(each.kind for each in events) == {EventKind.REGISTERED: FLEET}
    assert [each.at for each in events] == sorted(each.at for each in events)
    paged: list[Any] = []
    while page := call(newcomer, "events", "planner", after=paged[-1].cursor if paged else "0-0", limit=3):
        paged += page  # a page never separates events with equal cursors, so no event is skipped
    assert paged == events
    pool = shards(namespace)[0]
    name = raw.zrange(pool.ids, 0, 0)[0]
    records.change(raw, pool.state, name, load=1)
    seen: list[tuple[int, int]] = []
    repaired = call(newcomer, "repair", "planner", progress=lambda done, of: seen.append((done, of)))
    assert (repaired.instances, repaired.wrong) == (FLEET, 1)
    assert seen[-1] == (FLEET, FLEET)
    assert call(newcomer, "release_many", found) == [True] * 2 * FLEET
    waiting.join(TIMEOUT)
    assert kept[-1] is not None


def units(found: list[AgentInstance]) -> list[tuple[AgentInstance, Lease]]:
    """Return instances with their leases. A lease knows its shard, which the tests need."""
    return [(each, each.lease) for each in found if isinstance(each.lease, Lease)]


def test_history_adds_the_shards(call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, backend: Backend) -> None:
    found = balancer.acquire_many("planner", 10)
    for shard in layouts_of(backend).of(shard_of(balancer, "p0")).shards:
        backend.run(sample(shard))
    rows = [row for row in call(newcomer, "series", "planner", window="5m", step="10s") if row.load is not None]
    assert rows
    assert max(row.load for row in rows) == 10
    assert rows[-1].waiters == 0
    balancer.release_many(found)


def test_checks_cover_all_shards(balancer: LoadBalancer) -> None:
    balancer.configure("planner", PoolSettings(unhealthy_threshold=1))
    checked = set()

    def check(instance: AgentInstance) -> bool:
        checked.add(instance.id)
        return instance.id != "p3"

    with balancer.run_checks("planner", check, interval=0.2):
        wait_until(lambda: len(checked) == FLEET, "all instances to be checked")
        wait_until(
            lambda: (
                [s.instance.id for s in balancer.status("planner")[0].instances if s.state is InstanceState.DOWN]
                == ["p3"]
            ),
            "the failing instance to be down",
        )


def test_settings_and_strategy_are_those_of_the_whole_pool(
    call: Call, backend: Backend, newcomer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    settings = PoolSettings(eject_after=3)
    balancer = LoadBalancer("round_robin", settings=settings, backend=backend)
    balancer.configure_pool("planner", shards=SHARDS)
    for number in range(FLEET):
        call(newcomer, "register_instance", AgentInstance(f"p{number}", "planner"))
    for pool in shards(namespace):
        if raw.zcard(pool.ids):
            assert raw.hget(pool.state, "#pool") == "schema=2 strategy=round_robin"
            assert raw.hget(pool.state, "#settings") == settings.packed()
    call(newcomer, "configure", "planner", PoolSettings(eject_after=9))
    (status,) = balancer.status("planner")
    assert status.settings == PoolSettings(eject_after=9)
    assert {raw.hget(pool.state, "#settings") for pool in shards(namespace)} == {PoolSettings(eject_after=9).packed()}
    with pytest.raises(InvalidArgument, match="round_robin"):
        LoadBalancer("random", backend=backend).register_instance(AgentInstance("p1", "planner"))


def test_registration_may_divide_a_new_pool(call: Call, backend: Backend, newcomer: LoadBalancer) -> None:
    balancer = LoadBalancer(backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"), shards=SHARDS)
    call(newcomer, "register_instance", AgentInstance("p1", "planner"))
    call(newcomer, "register_instance", AgentInstance("p1", "planner"), shards=SHARDS)
    with pytest.raises(InvalidArgument, match=r"^shards is 8; allowed: 4, the number of shards of the pool 'planner'"):
        call(newcomer, "register_instance", AgentInstance("p2", "planner"), shards=8)
    with pytest.raises(InvalidArgument, match="shards is 1; allowed: 4"):
        call(newcomer, "configure_pool", "planner", shards=1)
    with pytest.raises(InvalidArgument, match="shards is 1; allowed: 4"):
        call(newcomer, "register_instance", AgentInstance("p2", "planner"), shards=1)
    assert len(balancer.status("planner")[0].instances) == 2


@pytest.mark.thorough
def test_division_expires_unless_the_pool_has_instances(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(backend=backend)
    whole = keys.pool(namespace, "planner")
    call(balancer, "configure_pool", "planner", shards=SHARDS)
    assert 80_000_000 < raw.pttl(whole.state) <= 86_400_000
    assert call(balancer, "status") == []
    assert raw.zscore(keys.resources(namespace), "lb:planner") is not None
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    assert raw.pttl(whole.state) == -1
    call(balancer, "configure_pool", "planner", shards=SHARDS)
    assert raw.pttl(whole.state) == -1
    raw.pexpire(whole.state, 60_000)  # as if another process had set this TTL and had died before it noticed p0
    wait_until(lambda: raw.pttl(whole.state) == -1, "the process of the instance to keep the division")
    call(balancer, "remove_instance", "planner", "p0")
    assert 80_000_000 < raw.pttl(whole.state) <= 86_400_000
    assert raw.zscore(keys.resources(namespace), "lb:planner") is None
    call(balancer, "configure_pool", "planner", shards=SHARDS)
    for pool in (whole, *shards(namespace)):  # as if every state key had expired
        raw.unlink(pool.state)
    assert call(balancer, "status") == []
    assert raw.zscore(keys.resources(namespace), "lb:planner") is None


def test_use_before_the_division_is_known_logs_nothing(
    balancer: LoadBalancer, newcomer: LoadBalancer, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    backend = newcomer._operations.backend
    assert newcomer.release(newcomer.acquire("planner"))
    assert backend.run(sample(Pool.of(namespace, "planner"))) == 0
    assert caplog.messages == []


def test_pool_of_one_shard_keeps_its_keys(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"), shards=1)
    call(balancer, "configure_pool", "planner", shards=1)
    with pytest.raises(InvalidArgument, match="shards is 4; allowed: 1"):
        call(balancer, "configure_pool", "planner", shards=4)
    call(balancer, "release", call(balancer, "acquire", "planner"))
    found = {key.partition("}")[0] for key in raw.scan_iter(f"{namespace}:{{lb:*")}
    assert found == {f"{namespace}:{{lb:planner"}


@pytest.mark.parametrize("value", [0, 257, 1.5, "4", True, None])
def test_invalid_number_of_shards_is_refused(call: Call, backend: Backend, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="shards"):
        call(LoadBalancer(backend=backend), "configure_pool", "planner", shards=value)


def test_number_of_shards_may_change_after_deletion(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    assert newcomer.release(newcomer.acquire("planner"))
    assert call(balancer, "delete_pool", "planner")
    assert not call(balancer, "delete_pool", "planner")
    assert call(newcomer, "status", "planner") == []
    call(balancer, "configure_pool", "planner", shards=2)
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    instance = call(newcomer, "acquire", "planner")  # `newcomer` last saw four shards
    assert instance.lease.pool.shards == 2
    assert call(newcomer, "release", instance)
    assert call(newcomer, "remove_instance", "planner", "p0")
    assert raw.pttl(keys.pool(namespace, "planner").state) > 0, "an empty pool expires"
    call(balancer, "configure_pool", "planner", shards=1)
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    assert call(newcomer, "update_instance", "planner", "p0", max_capacity=3)
    assert raw.zrange(keys.pool(namespace, "planner").ids, 0, -1) == ["p0"]


@pytest.mark.thorough
def test_instances_are_registered_again_in_their_shards(own_server: Server, connect: Connect, namespace: str) -> None:
    backend = connect(own_server.url)
    balancer = divided(LoadBalancer(backend=backend))
    with own_server.client() as raw:
        raw.flushall()
        wait_until(
            lambda: sum(raw.zcard(pool.ids) for pool in shards(backend.namespace)) == FLEET,
            "all instances to be registered again",
        )
        assert raw.zcard(keys.pool(backend.namespace, "planner").ids) == 0
    assert len(balancer.status("planner")[0].instances) == FLEET


def test_empty_shards_stay_empty(balancer: LoadBalancer, backend: Backend, raw: Raw, namespace: str) -> None:
    """A process looks for its registrations in a shard without instances. This changes nothing in the shard."""
    other = LoadBalancer(backend=backend)
    other.configure_pool("small", shards=SHARDS)
    other.register_instance(AgentInstance("p0", "small", max_capacity=1))
    held = [other.acquire("small") for _ in range(5)]
    assert sum(each is not None for each in held) == 1
    assert {key for key in raw.scan_iter(f"{namespace}:{{lb:small*") if key.endswith(":state")} == {
        keys.pool(namespace, "small").state,
        shard_of(other, "p0", "small").keys.state,
    }
    assert other.release(held[0])


def test_waiter_moves_to_a_shard_with_free_capacity(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str, kept: list[Any]
) -> None:
    """A unit becomes free in each shard in turn. The waiter gets the unit, even if it waits in another shard."""
    found = balancer.acquire_many("planner", 2 * FLEET)
    for shard in {lease.pool for _, lease in units(found)}:
        freed = next(each for each, lease in units(found) if lease.pool is shard)
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda into=results: into.append(call(newcomer, "acquire", "planner", wait=TIMEOUT))
        )
        thread.start()
        wait_until(lambda: len(newcomer.leases("planner").waiters) == 1, "the waiter to queue")
        assert balancer.release(freed)
        thread.join(TIMEOUT)
        (moved,) = results
        assert moved.id == freed.id
        wait_until(lambda: newcomer.leases("planner").waiters == (), "the ticket to be released")
        found[found.index(freed)] = moved
    assert len(held(raw, namespace)) == 2 * FLEET
    kept.append(found)


def test_waiter_with_labels_moves_too(call: Call, balancer: LoadBalancer, kept: list[Any]) -> None:
    for number in range(6):
        balancer.register_instance(AgentInstance(f"g{number}", "planner", max_capacity=1, labels=frozenset({"gpu"})))
    found = balancer.acquire_many("planner", 6, require={"gpu"})
    assert len(found) == 6
    kept.append(found)
    for freed in found[:3]:
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda into=results: into.append(call(balancer, "acquire", "planner", wait=TIMEOUT, require={"gpu"}))
        )
        thread.start()
        wait_until(lambda: len(balancer.leases("planner").waiters) == 1, "the waiter to queue")
        assert balancer.release(freed)
        thread.join(TIMEOUT)
        assert results[0].id == freed.id
        kept.append(results)


def test_lease_that_expires_in_another_shard_is_noticed(
    call: Call, balancer: LoadBalancer, raw: Raw, kept: list[Any]
) -> None:
    found = balancer.acquire_many("planner", 2 * FLEET, ttl=60)
    kept.append(found)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(balancer, "acquire", "planner", wait=TIMEOUT)))
    thread.start()
    wait_until(lambda: len(balancer.leases("planner").waiters) == 1, "the waiter to queue")
    (waiter,) = [
        pool
        for pool in layouts_of(balancer._operations.backend).of(shard_of(balancer, "p0")).shards
        if raw.zcard(pool.keys.waitq)
    ]
    ended, lease = next(unit for unit in units(found) if unit[1].pool is not waiter)
    raw.zadd(lease.pool.keys.due, {lease.token: 1})  # the lease has now expired, in a shard that no process uses
    thread.join(TIMEOUT)
    assert results[0].id == ended.id


def test_queue_of_a_shard_is_first_in_first_out(
    call: Call, backend: Backend, raw: Raw, namespace: str, kept: list[Any]
) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.configure_pool("planner", shards=SHARDS)
    # p0 is the only instance, so all tickets are in its shard.
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    kept.append(balancer.acquire("planner"))
    order: list[int] = []

    def wait(number: int) -> None:
        with balancer.lease("planner", wait=TIMEOUT):
            order.append(number)

    def queued(count: int) -> bool:
        return bool(raw.zcard(home.waitq) == count)

    threads = []
    home = shard_of(balancer, "p0").keys
    for number in range(6):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        wait_until(partial(queued, number + 1), "the waiter to queue")
    assert balancer.release(kept[0])
    for thread in threads:
        thread.join(TIMEOUT)
    assert order == list(range(6))


def test_waiter_before_the_division_finds_the_shards(
    call: Call, backend: Backend, newcomer: LoadBalancer, raw: Raw, namespace: str, kept: list[Any]
) -> None:
    whole = keys.pool(namespace, "planner")
    thread = threading.Thread(target=lambda: kept.append(call(newcomer, "acquire", "planner", wait=TIMEOUT)))
    thread.start()
    wait_until(lambda: raw.zcard(whole.waitq) == 1, "the waiter to queue")
    divided(LoadBalancer(backend=backend))
    thread.join(TIMEOUT)
    assert kept[0].lease.pool.shards == SHARDS
    assert raw.zcard(whole.waitq) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2])
def test_waiter_follows_a_change_of_the_number(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, raw: Raw, namespace: str, kept: list[Any], count: int
) -> None:
    kept.append(balancer.acquire_many("planner", 2 * FLEET))
    results: list[Any] = []
    begin = time.monotonic()
    thread = threading.Thread(target=lambda: results.append(call(newcomer, "acquire", "planner", wait=TIMEOUT)))
    thread.start()
    wait_until(lambda: len(balancer.leases("planner").waiters) == 1, "the waiter to queue")
    balancer.delete_pool("planner")
    balancer.configure_pool("planner", shards=count)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    thread.join(TIMEOUT)
    (moved,) = results
    assert moved.lease.pool.shards == count
    assert call(newcomer, "acquire", "planner", wait=0.1) is None
    assert call(newcomer, "release", moved)
    assert time.monotonic() - begin < TIMEOUT
    assert not any(balancer.release_many(kept[0])), "leases of the deleted pool have ended"


def spread(url: str, namespace: str, grants: int, exchanges: int) -> Iterator[None]:
    """Acquire leases. When the test gives a signal, exchange random leases for new ones, `exchanges` times."""
    import random

    chance = random.Random(namespace)
    with AgentPerf(url, namespace=namespace) as perf:
        balancer = perf.balancer()
        held = [balancer.acquire("planner", ttl=600) for _ in range(grants)]
        yield
        for _ in range(exchanges):
            at = chance.randrange(len(held))
            balancer.release(held[at])
            held[at] = balancer.acquire("planner", ttl=600)
        yield
        balancer.release_many([each for each in held if each is not None])


@pytest.mark.thorough
def test_least_loaded_spreads_over_instances_of_all_shards(
    server: Server, backend: Backend, namespace: str, workers: Workers
) -> None:
    """With 1,000 instances in 8 shards and 4,000 leases of 8 processes, no load is more than 2 above the mean load."""
    balancer = LoadBalancer(backend=backend)
    balancer.configure_pool("planner", shards=8)
    for number in range(1000):
        balancer.register_instance(AgentInstance(f"i{number}", "planner", max_capacity=10))
    crowd = [workers.start(spread, server.url, namespace, 500, 1000) for _ in range(8)]
    for step in range(2):
        for worker in crowd:
            worker.said()
        loads = [each.current_load for each in balancer.instances["planner"]]
        assert sum(loads) == 4000
        assert max(loads) - statistics.mean(loads) <= 2, step
        homes = defaultdict(list)
        for each in balancer.instances["planner"]:
            homes[shard_of(balancer, each.id).shard].append(each.current_load)
        means = [statistics.mean(found) for found in homes.values()]
        assert max(means) - min(means) < 1, "the shards carry about the same"
        for worker in crowd:
            worker.answer()


def work_for(url: str, namespace: str, seconds: float, held_s: float, threads: int) -> tuple[int, float, int]:
    """Hold leases in several threads. Returns the number of leases, the seconds they were held, and the failures."""
    with AgentPerf(url, namespace=namespace) as perf:
        balancer = perf.balancer()
        end = time.monotonic() + seconds
        results: list[float] = []
        failures: list[Exception] = []

        def work() -> None:
            while time.monotonic() < end:
                try:
                    with balancer.lease("planner", wait=TIMEOUT):
                        begin = time.monotonic()
                        time.sleep(held_s)
                        results.append(min(end, time.monotonic()) - min(end, begin))
                except NoCapacity as error:
                    failures.append(error)

        crowd = [threading.Thread(target=work) for _ in range(threads)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        return len(results), sum(results), len(failures)


@pytest.mark.thorough
@pytest.mark.parametrize("waiting", [4, 16], ids=["few", "many"])
def test_saturated_pool_is_used_and_loses_no_waiter(
    server: Server, backend: Backend, namespace: str, workers: Workers, waiting: int
) -> None:
    """There are 16 units, and 4 or 16 more callers than units. A caller holds a unit for one second.

    On a busy machine, a smaller share of any pool is in use. Therefore the test compares two shares: that of a pool
    with 8 shards, and that of a pool with one shard. The benchmark `pool-shards` shows the share itself. In that
    benchmark, a caller holds a unit for 0.2 s.
    """
    balancer = LoadBalancer(backend=backend)
    processes, seconds = 4, 6.0
    used = {}
    for number_of_shards in (1, 8):
        balancer.configure_pool("planner", shards=number_of_shards)
        for number in range(16):
            balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=1))
        threads = (16 + waiting) // processes
        results = workers.run(work_for, [(server.url, namespace, seconds, 1.0, threads)] * processes)
        assert sum(failed for _, _, failed in results) == 0, "a waiter was lost"
        used[number_of_shards] = sum(held for _, held, _ in results) / (16 * seconds)
        wait_until(lambda: balancer.status("planner")[0].current_load == 0, "all leases to end")
        assert balancer.leases("planner").waiters == ()
        balancer.delete_pool("planner")
    assert used[8] >= 0.9 * used[1]


@pytest.mark.thorough
@pytest.mark.servers("cluster")
def test_dead_node_stops_only_its_own_shards(servers: Servers, connect: Connect) -> None:
    server = servers.fresh("cluster", "--cluster-require-full-coverage", "no")
    backend = connect(server.url)
    balancer = LoadBalancer(backend=backend)
    balancer.configure_pool("planner", shards=9)
    for number in range(60):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=2))
    balancer.release_many(balancer.acquire_many("planner", 100))
    slots = {each.keys.tag for each in layouts_of(backend).of(Pool.of(backend.namespace, "planner")).shards}
    assert len(slots) == 9
    whole = keys.pool(backend.namespace, "planner").state
    with server.client() as raw:
        dead_port = next(node.port for node in server.nodes if node.port != raw.get_node_from_key(whole).port)
        lost = {
            f"p{number}"
            for number in range(60)
            if raw.get_node_from_key(shard_of(balancer, f"p{number}").keys.state).port == dead_port
        }
    assert 0 < len(lost) < 40
    hurry(backend, 3.0)
    next(node for node in server.nodes if node.port == dead_port).kill()
    held = [balancer.acquire("planner") for _ in range(2 * (60 - len(lost)))]
    assert Counter(each.id for each in held if each) == {f"p{n}": 2 for n in range(60) if f"p{n}" not in lost}
    assert balancer.acquire("planner") is None
    begin = time.monotonic()
    with pytest.raises(BackendUnavailable, match=str(dead_port)):
        balancer.drain("planner", min(lost))
    assert time.monotonic() - begin < TIMEOUT
    assert balancer.release_many([each for each in held if each]) == [True] * len(held)


@pytest.mark.parametrize("count", [1, 2])
def test_status_finds_a_pool_with_another_number_of_shards(
    call: Call, balancer: LoadBalancer, newcomer: LoadBalancer, count: int
) -> None:
    assert len(newcomer.status("planner")[0].instances) == FLEET
    assert balancer.delete_pool("planner")
    balancer.configure_pool("planner", shards=count)
    balancer.register_instance(AgentInstance("p0", "planner"))
    for names in ((), ("planner",)):
        (status,) = call(newcomer, "status", *names)  # `newcomer` last saw four shards
        assert (len(status.instances), status.shards) == (1, count)


def test_lease_of_a_pool_that_was_deleted_and_divided_is_lost(
    call: Call, backend: Backend, newcomer: LoadBalancer
) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=4))
    renewed, released = call(balancer, "acquire", "planner", ttl=0.6), call(balancer, "acquire", "planner")
    extended = balancer.acquire("planner")
    assert extended is not None
    assert isinstance(extended.lease, Lease)
    several = call(balancer, "acquire_many", "planner", 1)
    assert newcomer.delete_pool("planner")
    newcomer.configure_pool("planner", shards=2)
    newcomer.register_instance(AgentInstance("p0", "planner"))
    assert not call(balancer, "release", released, outcome="rate_limited")
    assert newcomer.status("planner")[0].instances[0].state is InstanceState.RESTING
    assert call(balancer, "release_many", several) == [False]
    wait_until(lambda: renewed.lease.lost is not None, "the loss to be noticed")
    with pytest.raises(LeaseLost):
        extended.lease.extend(9.0)


def test_heartbeats_reach_the_other_shards_despite_an_error(
    call: Call, balancer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    first, *others = shards(namespace)
    raw.delete(first.state)
    raw.set(first.state, "damaged")
    with pytest.raises(CorruptState):
        call(balancer, "heartbeat", "planner", *(f"p{number}" for number in range(FLEET)), within=1000.0)
    timers = [name for pool in others for name in raw.zrange(pool.due, 0, -1) if name.startswith("H:")]
    assert sorted(timers) == sorted(f"H:{name}" for pool in others for name in raw.zrange(pool.ids, 0, -1))
    assert timers


def test_use_of_one_shard_samples_all_shards(balancer: LoadBalancer, raw: Raw, namespace: str) -> None:
    with balancer.lease("planner"):
        keeper = lease_keeper_of(balancer._operations.backend)
        keeper._sampler._take()
    assert [raw.exists(pool.history) for pool in shards(namespace)] == [1] * SHARDS


def test_deleted_pool_is_created_with_one_shard(call: Call, balancer: LoadBalancer) -> None:
    assert call(balancer, "delete_pool", "planner")
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    assert call(balancer, "status", "planner")[0].shards == 1


def test_registration_during_a_deletion_is_found(
    balancer: LoadBalancer, newcomer: LoadBalancer, server: Server, connect: Connect
) -> None:
    """A registration sends one request for the division, then one for the instance. The deletion ends in between."""
    assert newcomer.status("planner")
    registering = newcomer._operations.register(AgentInstance("late", "planner"), None, math.inf, math.inf)
    stepped(newcomer._operations.backend, registering, lambda: balancer.delete_pool("planner"))
    third = LoadBalancer(backend=connect(server.url))
    assert [each.instance.id for each in third.status("planner")[0].instances] == ["late"]
    assert third.release(third.acquire("planner"))


def test_registration_follows_a_division_that_replaces_its_own(
    balancer: LoadBalancer, newcomer: LoadBalancer, namespace: str, raw: Raw
) -> None:
    def change() -> None:
        assert balancer.delete_pool("planner")
        balancer.configure_pool("planner", shards=2)
        balancer.register_instance(AgentInstance("p0", "planner"))

    assert newcomer.status("planner")
    registering = newcomer._operations.register(AgentInstance("late", "planner"), None, math.inf, math.inf)
    stepped(newcomer._operations.backend, registering, change)
    assert shard_of(newcomer, "late").shards == 2
    assert [raw.zcard(pool.ids) for pool in shards(namespace)] == [0] * SHARDS
    assert {each.instance.id for each in balancer.status("planner")[0].instances} == {"p0", "late"}


def stepped(backend: Backend, flow: Flow[Any], meanwhile: Callable[[], object] | None) -> None:
    """Run a flow. After the first confirmation of a division, call `meanwhile`."""
    answer: Any = None
    with contextlib.suppress(StopIteration):
        while True:
            step: Any = flow.send(answer)
            answer = backend.run(iter(step))
            if isinstance(answer, Division) and meanwhile is not None:
                meanwhile()
                meanwhile = None


def test_deleted_division_leaves_no_key_without_ttl(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    assert call(balancer, "delete_pool", "planner")
    call(balancer, "configure_pool", "planner", shards=SHARDS)
    call(balancer, "register_instance", AgentInstance("p0", "planner"))
    assert call(balancer, "delete_pool", "planner")
    assert raw.pttl(keys.pool(namespace, "planner").state) != -1


def test_deletion_removes_instances_registered_meanwhile(balancer: LoadBalancer, raw: Raw) -> None:
    """A process registers an instance in a shard that was already deleted, and is killed before it can go on."""
    operations, home = balancer._operations, shard_of(balancer, "late")
    known = Registered(AgentInstance("late", "planner"), None, 0, Rates(), None, 0)
    late = operations.clock.before_deadline(home, partial(registration, home, known))
    stepped(operations.backend, operations.delete_pool("planner"), lambda: operations.backend.run(late))
    assert raw.zcard(home.keys.ids) == 0
