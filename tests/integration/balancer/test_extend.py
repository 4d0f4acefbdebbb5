"""`lease.extend` gives a lease another TTL, and `lease.remaining` says how long it is valid."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from agentperf_redis import AgentInstance, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancer
from agentperf_redis.balancer.lease_keeper import lease_keeper_of
from agentperf_redis.errors import BackendUnavailable, InvalidArgument, LeaseLost
from tests.support.calls import Call
from tests.support.clock import server_ms
from tests.support.servers import Raw, wait_until


@pytest.fixture
def lb(backend: Backend) -> LoadBalancer:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=2))
    return balancer


@pytest.fixture
def pool(namespace: str) -> keys.PoolKeys:
    return keys.pool(namespace, "planner")


def extend(call: Call, runner: asyncio.Runner, lease: Any, ttl: float) -> None:
    if call.is_async:
        runner.run(lease.aextend(ttl))
    else:
        lease.extend(ttl)


def left_s(raw: Raw, pool: keys.PoolKeys, lease: Any) -> float:
    return (float(raw.zscore(pool.due, lease.token)) - server_ms(raw)) / 1000


@pytest.mark.parametrize("ttl", [600.0, 10.0])
def test_extended_lease_expires_after_the_new_ttl(
    lb: LoadBalancer, call: Call, runner: asyncio.Runner, raw: Raw, pool: keys.PoolKeys, ttl: float
) -> None:
    with call.inside(lb, "lease", "planner", ttl=30) as lease:
        assert 0 < lease.remaining <= 30
        extend(call, runner, lease, ttl)
        assert lease.ttl == ttl
        assert ttl - 9 < lease.remaining <= ttl
        assert ttl - 9 < left_s(raw, pool, lease) <= ttl
        lb.status("planner")
        other = lb.acquire("planner")
        # In a full pool, acquire also corrects timers that are later than now plus the TTL of their lease.
        assert lb.acquire("planner", wait=0.01) is None
        assert ttl - 9 < left_s(raw, pool, lease) <= ttl
        assert int(raw.hget(pool.state, "#next")) <= raw.zscore(pool.due, lease.token)
        assert lb.release(other)
    assert lease.remaining == 0


def test_renewals_keep_the_new_ttl(lb: LoadBalancer, call: Call, runner: asyncio.Runner) -> None:
    with call.inside(lb, "lease", "planner", ttl=600) as lease:
        extend(call, runner, lease, 0.6)
        until = lease.valid_until
        wait_until(lambda: lease.valid_until > until, "the lease is renewed")
        assert lease.remaining <= 0.6
        assert lease.ttl == 0.6


def test_lease_that_ended_cannot_be_extended(lb: LoadBalancer, call: Call, runner: asyncio.Runner) -> None:
    lost: list[LeaseLost] = []
    instance = call(lb, "acquire", "planner", on_lost=lost.append)
    lb.release_token("planner", instance.lease.token)
    for _ in range(2):
        with pytest.raises(LeaseLost, match="another caller released it"):
            extend(call, runner, instance.lease, 5)
    wait_until(lambda: lost, "on_lost is called")
    other = call(lb, "acquire", "planner")
    call(lb, "release", other)
    with pytest.raises(LeaseLost, match="it was released"):
        extend(call, runner, other.lease, 5)


def test_lease_released_during_its_extension_is_lost(
    lb: LoadBalancer, backend: Backend, call: Call, runner: asyncio.Runner
) -> None:
    lease = call(lb, "acquire", "planner").lease
    call(lb, "release_token", "planner", lease.token)
    assert lease.end()  # as if the release came after the check in `extend`; the keeper does not repeat this check
    keeper = lease_keeper_of(backend)
    extension = SimpleNamespace(extend=partial(keeper.extend, lease), aextend=partial(keeper.aextend, lease))
    with pytest.raises(LeaseLost, match="it was released meanwhile"):
        extend(call, runner, extension, 5)


@pytest.mark.parametrize("ttl", [0, -1, 86_401, "5", None, float("nan")])
def test_invalid_ttl_is_refused(lb: LoadBalancer, call: Call, runner: asyncio.Runner, ttl: Any) -> None:
    with call.inside(lb, "lease", "planner") as lease:
        with pytest.raises(InvalidArgument, match=r"ttl is .*; allowed: seconds from 0.05 to 86400"):
            extend(call, runner, lease, ttl)
        assert lease.held


@pytest.mark.thorough
def test_renewals_never_shorten_an_extension(lb: LoadBalancer, raw: Raw, pool: keys.PoolKeys) -> None:
    """Extensions and renewals with the old TTL alternate at full speed. The server never keeps the shorter TTL."""
    extended = 0
    until = time.monotonic() + 5
    while time.monotonic() < until:
        # On a busy machine, a lease of 0.15 s may expire before its renewal or extension reaches the server.
        with contextlib.suppress(LeaseLost, BackendUnavailable), lb.lease("planner", ttl=0.15) as lease:
            time.sleep(0.05)  # a renewal is due now
            lease.extend(60)
            time.sleep(0.01)
            assert left_s(raw, pool, lease) > 40
            assert lease.remaining > 40
            extended += 1
    assert extended
