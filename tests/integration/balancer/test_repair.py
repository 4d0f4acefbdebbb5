"""Repair of the health state of a pool."""

from __future__ import annotations

import pytest

from agentperf_redis import AgentInstance, PoolSettings, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import InstanceState, InstanceStatus, LoadBalancer
from tests.support.calls import Call
from tests.support.servers import Raw, wait_until

LONG_AGO_US = 1_000_000_000_000_000


@pytest.fixture
def pool(namespace: str) -> keys.PoolKeys:
    return keys.pool(namespace, "planner")


def status_of(balancer: LoadBalancer, name: str) -> InstanceStatus:
    (pool,) = balancer.status("planner")
    return next(each for each in pool.instances if each.instance.id == name)


def test_repair_rearms_lost_timers(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentperf_redis.balancer.flows.instances.REPAIR_PAGE", 2)
    settings = PoolSettings(eject_after=1, base_ejection_time=60, slow_start=600, rate_burst=0)
    balancer = LoadBalancer(settings=settings, backend=backend)
    for name in ("ill", "well"):
        balancer.register_instance(AgentInstance(name, "planner"))
    balancer.register_instance(AgentInstance("metered", "planner"), requests_per_minute=1)
    raw.zadd(pool.ids, dict.fromkeys(("ill", "metered", "well"), LONG_AGO_US))
    balancer.register_instance(AgentInstance("new", "planner"))
    for each in [balancer.acquire("planner") for _ in range(4)]:
        balancer.release(each, outcome="error" if each and each.id == "ill" else "neutral")
    states = [InstanceState.EJECTED, InstanceState.RATE_LIMITED, InstanceState.UP, InstanceState.WARMING]
    assert [status_of(balancer, name).state for name in ("ill", "metered", "well", "new")] == states
    due: dict[str, float] = dict(raw.zrange(pool.due, 0, -1, withscores=True))
    away = raw.zrange(pool.tag + ":away", 0, -1, withscores=True)
    assert set(due) == {"E:ill", "R:metered", "V:new"}

    raw.delete(pool.due)
    raw.hset(pool.state, "#next", 10**15)
    raw.zadd(pool.tag + ":away", {"ghost": 1, "well": 2})
    found = call(balancer, "repair", "planner")

    assert (found.wrong, found.orphans) == (0, 0)
    again: dict[str, float] = dict(raw.zrange(pool.due, 0, -1, withscores=True))
    assert set(again) == set(due)
    assert (again["E:ill"], again["R:metered"]) == (due["E:ill"], due["R:metered"])
    assert due["V:new"] <= again["V:new"] < due["V:new"] + 30_000  # repair restarts the timer of the slow-start step
    assert raw.zrange(pool.tag + ":away", 0, -1, withscores=True) == away
    assert int(raw.hget(pool.state, "#next")) == min(again.values())
    assert [status_of(balancer, name).state for name in ("ill", "metered", "well", "new")] == states


def test_repair_recounts_leases_of_half_open_instance(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    balancer = LoadBalancer(settings=PoolSettings(eject_after=1, base_ejection_time=0.05), backend=backend)
    for name in ("p0", "p1"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=6))
    held = [balancer.acquire("planner") for _ in range(10)]
    old = [each for each in held if each and each.id == "p0"]
    assert balancer.release(old.pop(), outcome="error")
    wait_until(lambda: status_of(balancer, "p0").state is InstanceState.HALF_OPEN, "its ejection to end")
    probe = next(each for each in (balancer.acquire("planner") for _ in range(3)) if each and each.id == "p0")
    assert status_of(balancer, "p0").limit == 5  # four leases older than the ejection, plus one probe

    for each in old[:2]:  # delete two leases by hand
        assert each.lease is not None
        raw.hdel(pool.state, each.lease.token)
        raw.zrem(pool.due, each.lease.token)
    assert call(balancer, "repair", "planner").wrong == 1

    status = status_of(balancer, "p0")
    assert (status.state, status.instance.current_load, status.limit) == (InstanceState.HALF_OPEN, 3, 3)
    for each in (*old[2:], probe):
        balancer.release(each, outcome="neutral")
    assert (status_of(balancer, "p0").instance.current_load, status_of(balancer, "p0").limit) == (0, 1)
