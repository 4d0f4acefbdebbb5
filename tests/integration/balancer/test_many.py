"""`acquire_many` and `release_many` need one round trip. A caller gets all leases or none, or as many as are free."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, LoadBalancingStrategy, commands
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from tests.support import records
from tests.support.calls import Call
from tests.support.proxy import Proxy
from tests.support.servers import TIMEOUT, Raw, wait_until
from tests.support.stalls import hurry

Connect = Callable[..., Backend]


@pytest.fixture(autouse=True)
def kept() -> Iterator[list[object]]:
    """A list that keeps leases until the backends are closed. A dropped lease would be released with a warning."""
    held: list[object] = []
    yield held
    held.clear()


@pytest.fixture
def pool(namespace: str) -> keys.PoolKeys:
    return keys.pool(namespace, "planner")


def balancer_with(backend: Backend, *capacities: int, strategy: Any = None, **facts: Any) -> LoadBalancer:
    balancer = LoadBalancer(strategy, backend=backend)
    for number, capacity in enumerate(capacities):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=capacity, **facts))
    return balancer


def held(raw: Raw, pool: keys.PoolKeys) -> list[str]:
    return records.held(raw.hgetall(pool.state))


@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_every_strategy_leases_all_units_at_once(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys, strategy: LoadBalancingStrategy
) -> None:
    balancer = balancer_with(backend, 1, 2, 3, strategy=strategy)
    found = call(balancer, "acquire_many", "planner", 6)
    assert Counter(each.id for each in found) == {"p0": 1, "p1": 2, "p2": 3}
    assert len({each.lease.token for each in found}) == 6
    for name in ("p0", "p1", "p2"):
        fences = [each.lease.fence for each in found if each.id == name]
        assert fences == sorted(set(fences))
    assert call(balancer, "acquire_many", "planner", 1) == []
    assert call(balancer, "release_many", found) == [True] * 6
    assert call(balancer, "release_many", found) == [False] * 6
    assert held(raw, pool) == []
    assert raw.hget(pool.state, "#load") == "0"


def test_least_loaded_picks_spread_within_one_call(call: Call, backend: Backend) -> None:
    balancer = balancer_with(backend, 10, 10, 10)
    found = call(balancer, "acquire_many", "planner", 9)
    assert Counter(each.id for each in found) == {"p0": 3, "p1": 3, "p2": 3}
    call(balancer, "release_many", found)


def test_all_or_none_leaves_no_partial_grant(call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys) -> None:
    balancer = balancer_with(backend, 2, 2)
    state = raw.hgetall(pool.state)
    assert call(balancer, "acquire_many", "planner", 5, all_or_none=True) == []
    after = raw.hgetall(pool.state)
    for facts in (state, after):
        facts.pop("#clock", None)
    assert after == state
    some = call(balancer, "acquire_many", "planner", 5)
    assert len(some) == 4
    call(balancer, "release_many", some)
    everything = call(balancer, "acquire_many", "planner", 4, all_or_none=True)
    assert len(everything) == 4
    call(balancer, "release_many", everything)


def test_all_or_none_counts_rate_limits_and_labels(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    limited = AgentInstance("p0", "planner", labels=frozenset({"gpu"}))
    balancer.register_instance(limited, requests_per_minute=0.01)  # one request now, the next one after 100 minutes
    balancer.register_instance(AgentInstance("p1", "planner", max_capacity=2, labels=frozenset({"gpu", "eu"})))
    balancer.register_instance(AgentInstance("p2", "planner", max_capacity=2))
    assert call(balancer, "acquire_many", "planner", 4, all_or_none=True, require={"gpu"}) == []
    assert call(balancer, "acquire_many", "planner", 3, all_or_none=True, require={"gpu", "eu"}) == []
    both = call(balancer, "acquire_many", "planner", 1, all_or_none=True, require={"gpu", "eu"})
    assert [each.id for each in both] == ["p1"]
    rest = call(balancer, "acquire_many", "planner", 2, all_or_none=True, require={"gpu"})
    assert sorted(each.id for each in rest) == ["p0", "p1"]
    call(balancer, "release_many", both + rest)


@pytest.mark.parametrize("fault", ["reset_after_reply", "half_reply", "swallow", "reset_before_request"])
@pytest.mark.parametrize("whole", [True, False])
def test_lost_reply_grants_no_lease_twice(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys, fault: str, whole: bool
) -> None:
    balancer = balancer_with(connect(proxy.url, deadline=2.0 if fault == "swallow" else 5.0), 5)
    call(balancer, "release_many", call(balancer, "acquire_many", "planner", 1))  # loads the scripts
    met = getattr(proxy, fault)(only=commands.ACQUIRE_MANY)
    found = call(balancer, "acquire_many", "planner", 3, all_or_none=whole)
    met.wait()
    assert sorted(held(raw, pool)) == sorted(each.lease.token for each in found)
    assert len(found) == 3
    assert call(balancer, "release_many", found) == [True] * 3
    assert held(raw, pool) == []


def test_late_request_grants_nothing(call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys) -> None:
    balancer = balancer_with(connect(proxy.url), 2)
    call(balancer, "release_many", call(balancer, "acquire_many", "planner", 1))
    late = proxy.hold(only=commands.ACQUIRE_MANY)
    found = call(balancer, "acquire_many", "planner", 3)
    assert len(found) == 2
    assert call(balancer, "release_many", found) == [True, True]
    late.deliver()
    assert held(raw, pool) == [], "neither the released tokens nor the refused one get a lease"


def test_lost_reply_of_release_frees_each_lease_once(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(connect(proxy.url), 5)
    found = call(balancer, "acquire_many", "planner", 4)
    met = proxy.reset_after_reply(only=commands.RELEASE, nth=2)
    assert call(balancer, "release_many", found) == [True] * 4
    met.wait()
    assert held(raw, pool) == []
    assert raw.hget(pool.state, "#load") == "0"


def test_unreachable_server_ends_requested_leases_later(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend, 5)
    call(balancer, "release_many", call(balancer, "acquire_many", "planner", 1))
    hurry(backend, 0.5)
    met = proxy.swallow(only=commands.ACQUIRE_MANY, times=100)
    with pytest.raises(BackendUnavailable):
        call(balancer, "acquire_many", "planner", 3, ttl=60)
    met.wait()
    wait_until(lambda: held(raw, pool) == [], "the leases to be released in the background")


def test_leases_are_renewed_and_fenced_one_by_one(call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys) -> None:
    balancer = balancer_with(backend, 5)
    lost: list[str] = []
    found = call(balancer, "acquire_many", "planner", 3, ttl=0.3, on_lost=lambda loss: lost.append(loss.token))
    expiry = {each.lease.token: raw.zscore(pool.due, each.lease.token) for each in found}
    wait_until(
        lambda: all((raw.zscore(pool.due, token) or 0) > at for token, at in expiry.items()), "all to be renewed"
    )
    gone = found[1].lease
    assert balancer.release_token("planner", gone.token)
    wait_until(lambda: lost == [gone.token], "the loss of one lease to be reported")
    assert call(balancer, "release_many", found) == [True, False, True]


def test_call_waits_for_its_first_unit_only(call: Call, backend: Backend, kept: list[object]) -> None:
    balancer = balancer_with(backend, 2)
    first = balancer.acquire_many("planner", 2)
    kept.append(first)
    waiting = threading.Thread(target=lambda: kept.append(call(balancer, "acquire_many", "planner", 2, wait=TIMEOUT)))
    waiting.start()
    wait_until(lambda: balancer.status("planner")[0].waiting == 1, "the call to queue")
    assert balancer.release(first[0])
    waiting.join(TIMEOUT)
    (second,) = [each for each in kept if isinstance(each, list) and each is not first]
    assert len(second) == 1
    started = time.monotonic()
    assert call(balancer, "acquire_many", "planner", 2, wait=0.05) == []
    assert time.monotonic() - started >= 0.05


def test_fallback_pools_get_the_missing_leases(call: Call, backend: Backend) -> None:
    balancer = balancer_with(backend, 2)
    balancer.register_instance(AgentInstance("g0", "generalist", max_capacity=4))
    found = call(balancer, "acquire_many", "planner", 5, fallback=("generalist",))
    assert Counter(each.agent_type for each in found) == {"planner": 2, "generalist": 3}
    call(balancer, "release_many", found)
    found = call(balancer, "acquire_many", "planner", 3, all_or_none=True, fallback=("generalist",))
    assert {each.agent_type for each in found} == {"generalist"}
    call(balancer, "release_many", found)


def test_cancelled_call_keeps_no_lease(connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys) -> None:
    balancer = balancer_with(connect(proxy.url), 5)

    async def cancel() -> None:
        await balancer.aio.release_many(await balancer.aio.acquire_many("planner", 1))
        kept = proxy.keep_reply(only=commands.ACQUIRE_MANY)
        task = asyncio.create_task(balancer.aio.acquire_many("planner", 3))
        await asyncio.to_thread(kept.answered.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        kept.let_go()

    asyncio.run(cancel())
    wait_until(lambda: held(raw, pool) == [], "the leases to be released")


def test_each_lease_reports_its_own_outcome(call: Call, backend: Backend) -> None:
    balancer = balancer_with(backend, 1, 1, 1)
    found = {each.id: each for each in call(balancer, "acquire_many", "planner", 3)}
    for name, outcome in (("p1", "error"), ("p2", "rate_limited")):
        found[name].lease.outcome = outcome
    found["p2"].lease.retry_after = 60.0
    assert call(balancer, "release_many", list(found.values()), response_time=0.2) == [True] * 3
    status = {each.instance.id: each for each in balancer.status("planner")[0].instances}
    assert (status["p0"].served, status["p0"].instance.response_time_ms) == (1, 200.0)
    assert (status["p1"].served, status["p1"].failed) == (0, 1)
    assert 55 < status["p2"].resting_for <= 60


def test_failed_release_keeps_no_other_instance_from_resting(call: Call, backend: Backend, raw: Raw) -> None:
    balancer = balancer_with(backend, 1)
    balancer.register_instance(AgentInstance("d0", "damaged", max_capacity=1))
    damaged, ended = call(balancer, "acquire", "damaged"), call(balancer, "acquire", "planner")
    assert balancer.release_token("planner", ended.lease.token)
    state = keys.pool(backend.namespace, "damaged").state
    raw.delete(state)
    raw.set(state, "no hash")
    with pytest.raises(AgentPerfError):
        call(balancer, "release_many", [damaged, ended], outcome="rate_limited")
    assert balancer.status("planner")[0].instances[0].resting_for > 0


def test_damaged_record_is_reported_before_anything_is_written(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(backend, 2, 2)
    raw.hset(pool.state, "p0", "load=nonsense")
    instances = raw.hmget(pool.state, "p0", "p1")
    with pytest.raises(CorruptState, match="p0"):
        call(balancer, "acquire_many", "planner", 2)
    # After the error, the background thread releases both tokens of the failed call. The releases may leave tombstones,
    # but no lease.
    assert (raw.hmget(pool.state, "p0", "p1"), held(raw, pool)) == (instances, [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"count": 0}, "count"),
        ({"count": 501}, "count"),
        ({"count": True}, "count"),
        ({"count": 2, "all_or_none": 1}, "all_or_none"),
        ({"count": 2, "all_or_none": True, "wait": 1.0}, "wait"),
    ],
)
def test_invalid_arguments_are_refused_before_sending(
    call: Call, backend: Backend, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        call(LoadBalancer(backend=backend), "acquire_many", "planner", **arguments)


@pytest.mark.parametrize("instances", [None, "p0", [None], [AgentInstance("p0", "planner")]])
def test_instances_without_leases_are_refused(call: Call, backend: Backend, instances: Any) -> None:
    with pytest.raises(InvalidArgument, match="instances"):
        call(LoadBalancer(backend=backend), "release_many", instances)
