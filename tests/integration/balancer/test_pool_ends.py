"""A pool without instances, leases and waiters leaves nothing behind, and `delete_pool` deletes a pool at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import AgentInstance, PoolSettings, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancer, commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.history import sample
from agentperf_redis.errors import InvalidArgument
from tests.support.calls import Call
from tests.support.servers import Raw, Server, wait_until

MINUTE_MS, DAY_MS, WEEK_MS = 60_000, 86_400_000, 604_800_000
LISTED = "lb:planner"


@pytest.fixture
def lb(backend: Backend) -> LoadBalancer:
    return LoadBalancer(backend=backend)


@pytest.fixture
def other(server: Server, connect: Callable[..., Backend]) -> LoadBalancer:
    """A balancer with its own registrations and leases, like the balancer of another process."""
    return LoadBalancer(backend=connect(server.url))


@pytest.fixture
def ttls(raw: Raw, namespace: str) -> Callable[[], dict[str, int]]:
    """Return a function that reads the TTLs of the pool's keys in ms, by the last part of the key. -1 means no TTL."""
    tag = keys.pool(namespace, "planner").tag

    def read() -> dict[str, int]:
        return {key.rpartition("}:")[2]: raw.pttl(key) for key in raw.scan_iter(f"{tag}:*", count=1000)}

    return read


def listed(raw: Raw, namespace: str) -> bool:
    return raw.zscore(keys.resources(namespace), LISTED) is not None


def expire(raw: Raw, namespace: str) -> None:
    """Act as if a minute had passed: expire every key of the pool, and backdate its entry in the list of resources."""
    for key in raw.scan_iter(f"{keys.pool(namespace, 'planner').tag}:*", count=1000):
        assert 0 < raw.pttl(key) <= MINUTE_MS, key
        raw.pexpire(key, 1)
    raw.zadd(keys.resources(namespace), {LISTED: 1}, xx=True)
    wait_until(lambda: not list(raw.scan_iter(f"{keys.pool(namespace, 'planner').tag}:*")), "the keys expire")


def use(lb: LoadBalancer, name: str = "p0", **facts: Any) -> None:
    lb.register_instance(AgentInstance(name, "planner", labels=frozenset({"gpu"}), **facts), heartbeat_ttl=60)
    held = lb.acquire("planner", require={"gpu"})
    assert lb.release(held)
    assert lb.acquire("planner", require={"other"}, wait=0.01) is None


def test_pool_without_instances_expires(
    lb: LoadBalancer, call: Call, ttls: Callable[[], dict[str, int]], raw: Raw, namespace: str
) -> None:
    use(lb)
    lb._backend.run(sample(Pool.of(namespace, "planner")))
    assert all(ttl == -1 for part, ttl in ttls().items() if part != "history")
    assert listed(raw, namespace)
    # Without this deletion, the waiter's tombstone would keep the pool for 90 s: the default TTL of 30 s, plus 60 s.
    raw.delete(keys.pool(namespace, "planner").due)
    assert call(lb, "remove_instance", "planner", "p0")
    found = ttls()
    assert set(found) == {"state", "events", "history"}
    assert all(0 < ttl <= MINUTE_MS for ttl in found.values())
    assert not listed(raw, namespace)
    assert lb.status() == []
    assert call(lb, "acquire", "planner") is None
    expire(raw, namespace)


def test_tombstones_keep_an_empty_pool_for_their_time(
    lb: LoadBalancer, ttls: Callable[[], dict[str, int]], raw: Raw, namespace: str
) -> None:
    use(lb)
    lb.remove_instance("planner", "p0")
    found = ttls()
    assert all(MINUTE_MS < ttl <= 2 * MINUTE_MS for ttl in found.values())
    # If the background thread has sampled the pool meanwhile, the pool has a history.
    assert set(found) - {"history"} == {"state", "due", "events"}


def test_late_tombstone_expires_with_its_empty_pool(
    lb: LoadBalancer, ttls: Callable[[], dict[str, int]], namespace: str
) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    lb.remove_instance("planner", "p0")
    assert "due" not in ttls()
    lb._backend.run(commands.release(Pool.of(namespace, "planner"), "@cancelled", tombstone_ms=90_000))
    found = ttls()
    assert "due" in found
    assert all(MINUTE_MS < ttl <= 90_000 for ttl in found.values())


@pytest.mark.parametrize("ends", ["released", "expired"])
def test_removed_instance_with_leases_expires_after_them(
    lb: LoadBalancer, call: Call, ttls: Callable[[], dict[str, int]], raw: Raw, namespace: str, ends: str
) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    held = call(lb, "acquire", "planner")
    lb.remove_instance("planner", "p0")
    assert all(MINUTE_MS < ttl <= WEEK_MS for ttl in ttls().values())
    if ends == "released":
        assert call(lb, "release", held, outcome="error")
        assert all(0 < ttl <= MINUTE_MS for ttl in ttls().values())
    else:
        raw.zadd(keys.pool(namespace, "planner").due, {held.lease.token: 1})
        lb.status("planner")
        assert all(0 < ttl <= 2 * MINUTE_MS for ttl in ttls().values())


def test_waiters_without_instances_leave_nothing(
    lb: LoadBalancer, call: Call, ttls: Callable[[], dict[str, int]]
) -> None:
    assert call(lb, "acquire", "planner", wait=0.05) is None
    found = ttls()
    assert found
    assert all(0 < ttl <= 2 * MINUTE_MS for ttl in found.values())


def test_instance_that_comes_back_keeps_the_pool(
    lb: LoadBalancer, call: Call, ttls: Callable[[], dict[str, int]], raw: Raw, namespace: str
) -> None:
    lb.configure("planner", PoolSettings(eject_after=3))
    use(lb)
    lb.remove_instance("planner", "p0")
    call(lb, "register_instance", AgentInstance("p1", "planner"))
    assert {part: ttl for part, ttl in ttls().items() if part != "history"}.keys() >= {"state", "events", "ids"}
    assert all(ttl == -1 for part, ttl in ttls().items() if part != "history")
    assert listed(raw, namespace)
    (pool,) = lb.status()
    assert pool.settings == PoolSettings(eject_after=3)
    assert "#expires" not in raw.hgetall(keys.pool(namespace, "planner").state)


def test_configured_settings_wait_a_day_for_instances(lb: LoadBalancer, ttls: Callable[[], dict[str, int]]) -> None:
    lb.configure("planner", PoolSettings(eject_after=3))
    assert all(MINUTE_MS < ttl <= DAY_MS for ttl in ttls().values())


def test_process_does_not_restore_an_instance_that_another_removed(
    lb: LoadBalancer, other: LoadBalancer, raw: Raw, namespace: str
) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    assert other.remove_instance("planner", "p0")
    pool = Pool.of(namespace, "planner")
    assert lb._backend.run(lb._operations.registrations.restore(pool)) is False
    assert lb.status() == []


def test_pools_that_expired_disappear_from_the_list(lb: LoadBalancer, call: Call, raw: Raw, namespace: str) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    instance = call(lb, "acquire", "planner")
    lb.remove_instance("planner", "p0")
    call(lb, "release", instance)
    assert listed(raw, namespace)  # a release does not remove the pool from the list
    expire(raw, namespace)
    assert call(lb, "status") == []
    assert not listed(raw, namespace)


def test_pool_in_use_stays_listed(lb: LoadBalancer, raw: Raw, namespace: str) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    raw.zadd(keys.resources(namespace), {LISTED: 1})
    assert len(lb.status()) == 1
    assert listed(raw, namespace)


def test_deleted_pool_is_gone_at_once(
    lb: LoadBalancer, other: LoadBalancer, call: Call, ttls: Callable[[], dict[str, int]], raw: Raw, namespace: str
) -> None:
    for number in range(3):
        use(lb, f"p{number}", max_capacity=2)
    other.register_instance(AgentInstance("theirs", "planner", labels=frozenset({"eu"})))
    held = other.acquire("planner")
    lb._backend.run(commands.claim_checks(Pool.of(namespace, "planner"), 1000, 100))
    assert len(ttls()) >= 8
    assert call(lb, "delete_pool", "planner") is True
    assert set(ttls()) == {"state"}
    assert lb.status() == other.status() == []
    assert not listed(raw, namespace)
    assert other.release(held) is False
    for each in (lb, other):
        assert each._backend.run(each._operations.registrations.restore(Pool.of(namespace, "planner"))) is False
    assert call(lb, "delete_pool", "planner") is False
    expire(raw, namespace)


def test_deleted_pool_loses_its_leases(lb: LoadBalancer, other: LoadBalancer, call: Call) -> None:
    lb.register_instance(AgentInstance("p0", "planner"))
    lost: list[object] = []
    held = lb.acquire("planner", ttl=0.3, on_lost=lost.append)
    assert held is not None
    call(other, "delete_pool", "planner")
    wait_until(lambda: lost, "the lease is lost")
    assert held.lease is not None
    assert held.lease.lost is not None


def test_waiter_of_a_deleted_pool_gets_a_later_instance(lb: LoadBalancer, other: LoadBalancer, call: Call) -> None:
    lb.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    held = lb.acquire("planner")
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(other.acquire("planner", wait=60)))
    waiter.start()
    wait_until(lambda: lb.status("planner")[0].waiting, "the waiter is in the queue")
    call(lb, "delete_pool", "planner")
    lb.register_instance(AgentInstance("p1", "planner", max_capacity=1))
    waiter.join(60)
    assert found[0].id == "p1"
    assert lb.release(held) is False
    assert other.release(found[0])


def test_pool_name_is_checked(lb: LoadBalancer, call: Call) -> None:
    with pytest.raises(InvalidArgument, match="agent_type"):
        call(lb, "delete_pool", "")


def test_hundred_pools_leave_no_key(lb: LoadBalancer, raw: Raw, namespace: str) -> None:
    for number in range(100):
        name = f"job-{number}"
        lb.register_instance(AgentInstance("only", name))
        lb.release(lb.acquire(name))
        lb.remove_instance(name, "only")
    left = [key for key in raw.scan_iter(f"{namespace}:{{lb:*", count=1000) if not 0 < raw.pttl(key) <= MINUTE_MS]
    assert left == []
    assert raw.zcard(keys.resources(namespace)) == 0
