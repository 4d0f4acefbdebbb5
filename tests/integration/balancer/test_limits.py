"""Limits of an instance: adaptive concurrency limits, slow start and rate limits."""

from __future__ import annotations

import asyncio
import bisect
import math
import random
import threading
import time
from collections import Counter
from typing import Any

import pytest

from agentperf_redis import AgentInstance, CorruptState, NoCapacity, PoolSettings, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import EventKind, InstanceState, InstanceStatus, LoadBalancer, commands
from agentperf_redis.balancer.commands import Pool
from tests.support import records
from tests.support.calls import Call
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers

LONG_AGO_US = 1_000_000_000_000_000
GRAIN_US = 2000
"""Tolerance for times, us: the timers of an instance have a resolution of one millisecond."""


def status_of(balancer: LoadBalancer, name: str) -> InstanceStatus:
    (pool,) = balancer.status("planner")
    return next(each for each in pool.instances if each.instance.id == name)


# Adaptive limits


@pytest.mark.thorough
def test_adaptive_limit_settles_at_the_knee_and_recovers(backend: Backend, runner: asyncio.Runner) -> None:
    settings = PoolSettings(adaptive=True, slow_after=0.015, eject_after=None)
    balancer = LoadBalancer(settings=settings, backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=10))
    concurrency = 3

    async def run(calls: int) -> list[int]:
        """Make `calls` calls from 12 callers. Return the limits that the callers saw during the second half."""
        begun, seen = 0, []

        async def caller() -> None:
            nonlocal begun
            while begun < calls:
                begun += 1
                instance = await balancer.aio.acquire("planner", wait=20)
                assert instance is not None
                slow = instance.current_load > concurrency
                await asyncio.sleep(0.005)
                await balancer.aio.release(instance, response_time=0.03 if slow else 0.005)
                if begun > calls / 2:
                    (pool,) = await balancer.aio.status("planner")
                    seen.append(pool.instances[0].limit)

        await asyncio.gather(*(caller() for _ in range(12)))
        return seen

    settled = runner.run(run(600))
    assert len(settled) > 250
    assert set(settled) <= {2, 3, 4}
    concurrency = 10
    assert 10 in runner.run(run(600))
    assert status_of(balancer, "p0").state is InstanceState.UP


def test_adaptive_limit_is_visible_reset_and_disabled(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(adaptive=True), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=10))
    for outcome in ("timeout", "rejected", "error", "neutral"):
        balancer.release(balancer.acquire("planner"), outcome=outcome)
    assert status_of(balancer, "p0").limit == 5  # 10 * 0.8 * 0.8 * 0.8
    assert status_of(balancer, "p0").instance.max_capacity == 10
    assert call(balancer, "update_instance", "planner", "p0", max_capacity=8)
    assert status_of(balancer, "p0").limit == 8
    balancer.release(balancer.acquire("planner"), outcome="timeout")
    assert status_of(balancer, "p0").limit == 6
    held = [balancer.acquire("planner") for _ in range(7)]
    assert held[5] is not None
    assert held[6] is None
    call(balancer, "configure", "planner", PoolSettings())
    assert status_of(balancer, "p0").limit == 8
    balancer.release(held[0], outcome="timeout")
    assert status_of(balancer, "p0").limit == 8


def test_concurrent_failures_lower_a_limit_once(backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(adaptive=True), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=10))
    for each in [balancer.acquire("planner") for _ in range(10)]:
        balancer.release(each, outcome="timeout")
    assert status_of(balancer, "p0").limit == 8


@pytest.mark.thorough
def test_limit_above_a_thousand_recovers(backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(adaptive=True), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1300))
    balancer.release(balancer.acquire("planner"), outcome="timeout")
    assert status_of(balancer, "p0").limit == 1040
    held = [balancer.acquire("planner") for _ in range(530)]
    for _ in range(1050):  # at a limit of 1040, it takes 1040 successful calls to raise the limit by one
        balancer.release(balancer.acquire("planner"))
    assert status_of(balancer, "p0").limit == 1041
    assert all(held)


def test_limit_grows_only_while_half_used(backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(settings=PoolSettings(adaptive=True), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=10))

    def adaptive_limit_milli() -> float:
        return records.number(raw.hget(keys.pool(namespace, "planner").state, "+p0"), "adaptive_limit_milli")

    balancer.release(balancer.acquire("planner"), outcome="timeout")
    held = [balancer.acquire("planner") for _ in range(2)]
    for _ in range(20):
        balancer.release(balancer.acquire("planner"))
    # At most three of eight units were in use, which is less than half.
    assert (adaptive_limit_milli(), len(held)) == (8000, 2)
    held.append(balancer.acquire("planner"))
    balancer.release(balancer.acquire("planner"))
    assert (adaptive_limit_milli(), len(held)) == (8125, 3)


def test_overload_ejects_only_when_lower_limits_fail(backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(adaptive=True, eject_after=3), backend=backend)
    for name in ("p0", "p1"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=4))
    outcomes = 0
    while status_of(balancer, "p0").state is InstanceState.UP:
        first, second = balancer.acquire("planner"), balancer.acquire("planner")
        for each in (first, second):
            assert each is not None
            balancer.release(each, outcome="timeout" if each.id == "p0" else "ok")
        outcomes += 1
        assert outcomes < 50
        if outcomes == 4:
            assert status_of(balancer, "p0").limit < 4
    # Seven timeouts lower the limit from 4 to 3.2, 2.56, 2.048, 1.638, 1.31, 1.048 and 1. The seventh timeout is the
    # first one that counts for ejection, and the third counted timeout ejects the instance. So at least the first six
    # timeouts cannot eject it.
    assert outcomes > 6


# Slow start


def age(raw: Raw, namespace: str) -> None:
    """Make the pool's instances appear to have been registered long ago."""
    ids = keys.pool(namespace, "planner").ids
    raw.zadd(ids, dict.fromkeys(raw.zrange(ids, 0, -1), LONG_AGO_US))


@pytest.mark.thorough
def test_new_instance_takes_a_growing_share(backend: Backend, raw: Raw, namespace: str, runner: asyncio.Runner) -> None:
    """The test, not the clock, makes each step due. So each step has the same number of calls."""
    balancer = LoadBalancer(settings=PoolSettings(slow_start=3600.0), backend=backend)
    for name in ("p0", "p1"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=20))
    age(raw, namespace)
    balancer.register_instance(AgentInstance("new", "planner", max_capacity=20))
    pool = keys.pool(namespace, "planner")

    async def share() -> float:
        """Return the new instance's share of 240 calls, of which 24 run concurrently."""
        granted: Counter[str] = Counter()

        async def caller() -> None:
            for _ in range(10):
                instance = await balancer.aio.acquire("planner")
                assert instance is not None
                granted[instance.id] += 1
                await asyncio.sleep(0.02)
                await balancer.aio.release(instance)

        await asyncio.gather(*(caller() for _ in range(24)))
        return granted["new"] / granted.total()

    shares = []
    for step in range(1, 10):  # each step adds a tenth of the capacity
        status = status_of(balancer, "new")
        assert (status.state, status.limit) == (InstanceState.WARMING, 2 * step)
        shares.append(runner.run(share()))
        assert status_of(balancer, "new").limit == 2 * step, "no step is due before its time"
        assert raw.zadd(pool.due, {"V:new": 1}, xx=True, ch=True) == 1
        raw.hset(pool.state, "#next", 1)
        balancer.release(balancer.acquire("planner"))
    thirds = [sum(shares[first : first + 3]) / 3 for first in (0, 3, 6)]
    assert thirds[0] < thirds[1] < thirds[2]
    assert thirds[0] < 0.2
    assert thirds[2] > 0.25
    assert (status_of(balancer, "new").state, status_of(balancer, "new").limit) == (InstanceState.UP, 20)
    kinds = [each.kind for each in balancer.events("planner") if each.instance_id == "new"]
    assert kinds == [EventKind.REGISTERED, EventKind.WARM]


def test_new_instance_is_warm_after_slow_start(backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(settings=PoolSettings(slow_start=0.5), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=20))
    age(raw, namespace)
    balancer.register_instance(AgentInstance("new", "planner", max_capacity=20))
    registered_us = raw.zscore(keys.pool(namespace, "planner").ids, "new")

    def warm() -> bool:
        status = status_of(balancer, "new")
        seconds, micros = raw.time()
        # A step takes 50 ms, a tenth of the slow start of half a second.
        steps = (seconds * 1_000_000 + micros - registered_us + GRAIN_US) // 50_000
        assert 2 <= status.limit <= 2 + 2 * steps
        return status.state is InstanceState.UP

    wait_until(warm, "the new instance to be warm")
    assert status_of(balancer, "new").limit == 20


def test_cold_fleet_takes_its_full_load_at_once(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(slow_start=30.0), backend=backend)
    for name in ("p0", "p1", "p2"):
        call(balancer, "register_instance", AgentInstance(name, "planner", max_capacity=4))
    held = [balancer.acquire("planner") for _ in range(12)]
    assert Counter(each.id for each in held if each) == {"p0": 4, "p1": 4, "p2": 4}


def test_new_fleet_beside_disabled_instances_starts_cold(backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(settings=PoolSettings(slow_start=30.0), backend=backend)
    for name in ("drained", "ill"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=4))
    age(raw, namespace)
    balancer.drain("planner", "drained")
    balancer.mark_unhealthy("planner", "ill")
    for name in ("p0", "p1", "p2"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=4))
    assert [status_of(balancer, name).limit for name in ("p0", "p1", "p2")] == [4, 4, 4]
    balancer.mark_healthy("planner", "ill")
    balancer.register_instance(AgentInstance("p3", "planner", max_capacity=4))
    assert (status_of(balancer, "p3").state, status_of(balancer, "p3").limit) == (InstanceState.WARMING, 1)


@pytest.mark.parametrize("panic_threshold", [0.5, 1.0])
def test_fleet_that_recovers_together_skips_warm_up(
    backend: Backend, raw: Raw, namespace: str, panic_threshold: float
) -> None:
    settings = PoolSettings(
        slow_start=30.0, unhealthy_threshold=1, healthy_threshold=1, panic_threshold=panic_threshold
    )
    balancer = LoadBalancer(settings=settings, backend=backend)
    names = [f"p{number}" for number in range(10)]
    for name in names:
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=10))
    pool = Pool.of(namespace, "planner")
    backend.run(commands.report_checks(pool, 1, [(name, False) for name in names]))
    for number, name in enumerate(names):
        backend.run(commands.report_checks(pool, 2 + number, [(name, True)]))
    limits = [status_of(balancer, name).limit for name in names]
    # With a threshold of 0.5, the pool panics. In a panic, all ten instances skip the warm-up. With a threshold of 1.0,
    # there is no panic. Without a panic, an instance skips the warm-up only while less than half of the pool is warm.
    # So only p0 to p4 skip the warm-up.
    assert limits == ([10] * 10 if panic_threshold < 1 else [10] * 5 + [1] * 5)
    raw.hset(pool.keys.state, "#calm", 1)
    for at, good in ((100, False), (101, True)):
        backend.run(commands.report_checks(pool, at, [("p0", good)]))
    # p0 has failed once more, and has recovered. p0 warms up only if at least half of the pool is warm. After a panic,
    # the nine other instances are warm. Without a panic, only p1 to p4 are warm.
    assert status_of(balancer, "p0").limit == (1 if panic_threshold < 1 else 10)
    assert int(raw.hget(pool.keys.state, "#warming")) == (1 if panic_threshold < 1 else 5)


def test_recovered_instance_warms_up_only_beside_others(backend: Backend, raw: Raw, namespace: str) -> None:
    settings = PoolSettings(slow_start=60, eject_after=1, base_ejection_time=0.05)
    balancer = LoadBalancer(settings=settings, backend=backend)
    for name in ("p0", "p1"):
        balancer.register_instance(AgentInstance(name, "planner", max_capacity=10))
    balancer.release(balancer.acquire("planner"), outcome="error")
    wait_until(lambda: status_of(balancer, "p0").state is InstanceState.HALF_OPEN, "its ejection to end")
    balancer.drain("planner", "p1")
    balancer.release(balancer.acquire("planner"))
    assert (status_of(balancer, "p0").state, status_of(balancer, "p0").limit) == (InstanceState.UP, 10)
    balancer.undrain("planner", "p1")
    age(raw, namespace)
    raw.hset(keys.pool(namespace, "planner").state, "#calm", 1)
    held = [balancer.acquire("planner"), balancer.acquire("planner")]
    for each in held:
        balancer.release(each, outcome="error" if each and each.id == "p0" else "neutral")
    wait_until(lambda: status_of(balancer, "p0").state is InstanceState.HALF_OPEN, "its ejection to end")
    held = [balancer.acquire("planner"), balancer.acquire("planner")]
    for each in held:
        balancer.release(each)
    assert (status_of(balancer, "p0").state, status_of(balancer, "p0").limit) == (InstanceState.WARMING, 1)


# Rates


def acquire_repeatedly(url: str, namespace: str, times: int, tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Acquire `times` times. Return the fencing tokens, which are the server's times of the grants in us.

    For each refusal, also return when the request was sent and when its reply arrived. The server and the client run on
    one machine, so they have the same clock.
    """
    balancer = LoadBalancer(backend=Backend(url, namespace=namespace))
    held, refused = [], []
    for _ in range(times):
        sent = time.time_ns() // 1000
        instance = balancer.acquire("planner", tokens=tokens)
        if instance is not None and instance.lease is not None:
            held.append(instance)
        else:
            refused.append((sent, time.time_ns() // 1000))
        time.sleep(0.008)
    return [each.lease.fence for each in held if each.lease is not None], refused


@pytest.mark.thorough
@pytest.mark.parametrize(("rates", "tokens"), [("requests", 0), ("tokens", 50)])
def test_acquires_get_exactly_what_gcra_allows(
    server: Server, backend: Backend, namespace: str, workers: Workers, rates: str, tokens: int
) -> None:
    balancer = LoadBalancer(backend=backend)
    every_us = {"requests": 1_000_000, "tokens": 500_000}[rates]
    given: Any = {"requests": {"requests_per_minute": 60.0}, "tokens": {"tokens_per_minute": 6000.0}}[rates]
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1000), **given)
    results = workers.run(acquire_repeatedly, [(server.url, namespace, 250, tokens)] * 4)
    grants = sorted(at for granted, _ in results for at in granted)
    refusals = sorted(each for _, refused in results for each in refused)
    assert len(grants) + len(refusals) == 1000
    arrivals, burst_us = [0], 6_000_000
    for at in grants:  # replay the grants with GCRA, the algorithm of the rate limit; `at` is the server's time
        assert at >= arrivals[-1] - burst_us, "one more than the rate allows"
        arrivals.append(max(arrivals[-1], at) + every_us)
    at_once = burst_us // every_us + 1
    assert len(grants) >= at_once + 1
    # Every refusal was right: its request was sent before the rate limit allowed the next lease. The earliest time of
    # the next lease is computed from the leases that were granted before the client received the refusal.
    too_early_us = [arrivals[bisect.bisect(grants, there)] - burst_us - sent for sent, there in refusals]
    assert all(each > -GRAIN_US for each in too_early_us), min(too_early_us)


def pass_time(raw: Raw, namespace: str, name: str, us: int) -> None:
    """Simulate that `us` microseconds pass: reduce the theoretical arrival times of an instance's rate limits."""
    pool = keys.pool(namespace, "planner")
    extra = raw.hget(pool.state, "+" + name)
    arrivals = ("rpm_arrival_us", "tpm_arrival_us")
    records.change(
        raw, pool.state, "+" + name, **{each: max(0, int(records.number(extra, each)) - us) for each in arrivals}
    )
    raw.hset(pool.state, "#next", 1)
    raw.zadd(pool.due, {"R:" + name: 1}, xx=True)


@pytest.mark.thorough
@pytest.mark.parametrize("rates", ["requests", "tokens"])
def test_leases_per_minute_stay_within_rate_and_burst(backend: Backend, raw: Raw, namespace: str, rates: str) -> None:
    """Some leases take far fewer tokens than the burst, others far more. `pass_time` simulates the passing of time."""
    chance = random.Random(6)
    balancer = LoadBalancer(backend=backend)
    rate = {"requests": 40, "tokens": 6000}[rates]
    given: dict[str, Any] = {f"{rates}_per_minute": rate}
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=10_000), **given)
    passed_us, granted = 0, list[tuple[int, int]]()
    for _ in range(600):
        tokens = chance.choice([*[50] * 20, 500, 500, 5000]) if rates == "tokens" else 0
        instance = balancer.acquire("planner", tokens=tokens)
        if instance is None:
            us = 30_000_000 if chance.random() < 0.01 else 500_000
            pass_time(raw, namespace, "p0", us)
            passed_us += us
        else:
            assert instance.lease is not None
            granted.append((instance.lease.fence + passed_us, tokens if rates == "tokens" else 1))
            balancer.release(instance)
    assert len(granted) > 50
    maximum = 0
    for first, (begin, _) in enumerate(granted):
        inside = [used for at, used in granted[first:] if at < begin + 60_000_000]
        maximum = max(maximum, sum(inside[:-1]))
        assert sum(inside[:-1]) <= rate * 1.1
    assert maximum > rate * 0.9, "no minute came near the limit"


def test_large_lease_delays_the_next_by_its_tokens(backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    limits: dict[str, Any] = {"tokens": {"tokens_per_minute": 6000.0}, "requests": {"requests_per_minute": 1.0}}
    for name, rates in limits.items():
        balancer.register_instance(AgentInstance("p0", name), **rates)
    for kind, tokens, backlog_s in (("tokens", 60_000, 600.0), ("requests", 0, 60.0)):
        begin = time.monotonic()
        held = balancer.acquire(kind, tokens=tokens)
        with pytest.raises(NoCapacity) as caught, balancer.lease(kind, tokens=1):
            pass
        assert balancer.release(held)
        # By default, an instance may be six seconds ahead of its rate limit. So the next lease is possible six seconds
        # before the end of the backlog.
        assert (
            backlog_s - 6.0 - (time.monotonic() - begin) - 0.002 <= caught.value.retry_after <= backlog_s - 6.0 + 0.002
        )


def test_refusal_by_rate_has_its_retry_after(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(rate_burst=0), backend=backend)
    instance = AgentInstance("p0", "planner")
    call(balancer, "register_instance", instance, requests_per_minute=6)
    assert status_of(balancer, "p0").requests_per_minute == 6
    begin = time.monotonic()
    balancer.release(balancer.acquire("planner"))
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "planner"):
        pass
    assert 9.99 - (time.monotonic() - begin) < caught.value.retry_after <= 10.01
    assert status_of(balancer, "p0").state is InstanceState.RATE_LIMITED
    assert status_of(balancer, "p0").instance.is_healthy
    assert call(balancer, "update_instance", "planner", "p0", requests_per_minute=math.inf)
    assert balancer.acquire("planner") is not None
    assert status_of(balancer, "p0").requests_per_minute == math.inf


def test_settings_apply_in_any_order_and_with_later_fields(
    call: Call, backend: Backend, raw: Raw, namespace: str
) -> None:
    balancer = LoadBalancer(settings=PoolSettings(rate_burst=6), backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"), requests_per_minute=6)
    state = keys.pool(namespace, "planner").state
    stored = records.changed(raw.hget(state, "#settings"), rate_burst_ms=0, later=7)
    raw.hset(state, "#settings", " ".join(reversed(stored.split())))
    begin = time.monotonic()
    balancer.release(balancer.acquire("planner"))
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "planner"):
        pass
    assert 9.99 - (time.monotonic() - begin) < caught.value.retry_after <= 10.01


@pytest.mark.parametrize("later", ["", " later=7"], ids=["usual", "with_later_fields"])
def test_settings_with_too_many_digits_are_corrupt(
    call: Call, backend: Backend, raw: Raw, namespace: str, later: str
) -> None:
    balancer = LoadBalancer(backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"), requests_per_minute=6)
    state = keys.pool(namespace, "planner").state
    usual = raw.hget(state, "#settings")
    for name in records.fields(usual):
        too_long = "0." + "1" * 11 if name in ("max_ejection_share", "panic_threshold") else "1" * 13
        raw.hset(state, "#settings", records.changed(usual, **{name: too_long}) + later)
        with pytest.raises(CorruptState, match="#settings"):
            call(balancer, "acquire", "planner")


def test_token_rate_settles_to_the_tokens_used(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(rate_burst=0), backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner"), tokens_per_minute=60_000)
    big = call(balancer, "acquire", "planner", tokens=30_000)  # as many tokens as the limit allows in half a minute
    assert balancer.acquire("planner") is None
    assert call(balancer, "release", big, tokens=0)
    with call.inside(balancer, "lease", "planner") as lease:
        assert lease.tokens == 0
        lease.tokens_used = 10_000
        begin = time.monotonic()
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "planner", tokens=5):
        pass
    assert 9.9 - (time.monotonic() - begin) < caught.value.retry_after <= 10.01


def test_waiter_is_granted_when_a_rate_recovers(call: Call, backend: Backend, raw: Raw) -> None:
    balancer = LoadBalancer(settings=PoolSettings(rate_burst=0), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner"), requests_per_minute=3000, tokens_per_minute=30_000)
    with StallDetector(raw.ping) as stalls:
        begin = time.monotonic()
        for _ in range(4):  # the token limit allows one lease per 0.2 s, the request limit one per 0.02 s
            call(balancer, "release", call(balancer, "acquire", "planner", wait=20, tokens=100))
        end = time.monotonic()
        assert end - begin >= 0.55
        assert stalls.own(begin, end) < 2.0


def test_rate_limited_instance_leaves_others_available(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(rate_burst=0), backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner"), requests_per_minute=1)
    balancer.register_instance(AgentInstance("p1", "planner"))
    held = [call(balancer, "acquire", "planner") for _ in range(5)]
    assert Counter(each.id for each in held) == {"p0": 1, "p1": 4}


def test_rates_are_restored_with_their_instance(own_server: Any, connect: Any) -> None:
    balancer = LoadBalancer(backend=connect(own_server.url))
    balancer.register_instance(AgentInstance("p0", "planner"), requests_per_minute=60)
    balancer.update_instance("planner", "p0", tokens_per_minute=1000)
    with own_server.client() as client:
        client.flushall()
    wait_until(lambda: balancer.status("planner") != [], "the instance to be registered again")
    status = status_of(balancer, "p0")
    assert (status.requests_per_minute, status.tokens_per_minute) == (60, 1000)


def test_tokens_without_rates_leave_no_extra_record(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    balancer = LoadBalancer(backend=backend)
    call(balancer, "register_instance", AgentInstance("p0", "planner", max_capacity=1))
    state = keys.pool(namespace, "planner").state
    for outcome in ("ok", "error"):
        instance = call(balancer, "acquire", "planner")
        waiter = threading.Thread(target=lambda: balancer.release(balancer.acquire("planner", wait=20.0)))
        waiter.start()
        wait_until(lambda: raw.zcard(keys.pool(namespace, "planner").waitq) == 1, "a waiter to join the queue")
        call(balancer, "release", instance, outcome=outcome, tokens=5000)
        waiter.join()
        assert not raw.hexists(state, "+p0")
