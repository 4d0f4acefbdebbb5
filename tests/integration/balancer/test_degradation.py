"""Degradation: fallback pools, and the results of calls while the server is unreachable."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, BackendUnavailable, NoCapacity, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancer, LoadBalancingStrategy
from agentperf_redis.errors import InvalidArgument
from tests.support import records
from tests.support.calls import Call
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector

DEADLINE_S = 1.0


@pytest.fixture
def balancer(backend: Backend) -> LoadBalancer:
    made = LoadBalancer(backend=backend)
    for kind in ("planner", "generalist", "anybody"):
        made.register_instance(AgentInstance(f"{kind}-1", kind, max_capacity=1, labels=frozenset({kind[0]})))
    return made


# Fallback pools


def test_fallback_pools_are_tried_in_order(call: Call, balancer: LoadBalancer) -> None:
    others = ("generalist", "anybody")
    held = [call(balancer, "acquire", "planner", fallback=others) for _ in range(4)]
    assert [each.agent_type if each else None for each in held] == ["planner", *others, None]
    for each in held[:3]:
        assert call(balancer, "release", each)
    assert [pool.current_load for pool in balancer.status()] == [0, 0, 0]
    with call.inside(balancer, "lease", "unknown", fallback=["anybody"]) as lease:
        assert (lease.agent_type, lease.instance_id) == ("anybody", "anybody-1")
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "unknown", fallback=["unknown too"]):
        pass
    assert caught.value.agent_type == "unknown"


def test_fallback_keeps_labels_and_affinity_but_not_strategy(call: Call, backend: Backend) -> None:
    sticky = LoadBalancer("consistent_hash", backend=backend)
    for number in range(8):
        labels = frozenset({"gpu", "fr"} if number < 4 else {"gpu"})
        sticky.register_instance(AgentInstance(f"s{number}", "sticky", max_capacity=50, labels=labels))
    busy = LoadBalancer("random", backend=backend)
    busy.register_instance(AgentInstance("b", "busy", max_capacity=1))
    request: dict[str, Any] = {"require": {"gpu", "fr"}, "affinity": "session 7", "fallback": ("sticky",)}
    seen = []
    for _ in range(6):
        instance = call(busy, "acquire", "busy", **request)
        seen.append(instance.id)
        call(busy, "release", instance)
    assert len(set(seen)) == 1
    assert seen[0] in {"s0", "s1", "s2", "s3"}
    assert call(sticky, "select_instance", "sticky", require={"gpu", "fr"}, affinity="session 7").id == seen[0]
    homes = {
        call(sticky, "select_instance", "sticky", require={"gpu", "fr"}, affinity=f"session {number}").id
        for number in range(40)
    }
    assert homes == {"s0", "s1", "s2", "s3"}
    assert busy.strategy is LoadBalancingStrategy.RANDOM


def test_waiter_tries_fallback_pools_when_time_is_up(call: Call, balancer: LoadBalancer, raw: Raw) -> None:
    held = [call(balancer, "acquire", kind) for kind in ("planner", "generalist")]
    waitq = keys.pool(balancer._backend.namespace, "planner").waitq
    for _ in range(5):  # retries: on a stalled machine, the wait may end before the lease is released
        ended = threading.Event()

        def release_while_the_caller_waits(ended: threading.Event = ended) -> None:
            while not raw.zcard(waitq) and not ended.is_set():
                time.sleep(0.01)
            balancer.release(held[1])

        freed = threading.Thread(target=release_while_the_caller_waits, daemon=True)
        freed.start()
        begin = time.monotonic()
        instance = call(balancer, "acquire", "planner", wait=0.4, fallback=("generalist",))
        ended.set()
        assert time.monotonic() - begin >= 0.4
        freed.join()
        if instance is not None:
            break
        held[1] = call(balancer, "acquire", "generalist")
    assert instance.agent_type == "generalist"
    back = threading.Timer(0.1, balancer.release, [held[0]])
    back.start()
    mine = call(balancer, "acquire", "planner", wait=5.0, fallback=("generalist",))
    assert mine.agent_type == "planner"
    back.join()
    for each in (instance, mine):
        call(balancer, "release", each)


@pytest.mark.parametrize("fallback", ["generalist", [""], 5, [None]])
def test_invalid_fallback_is_refused(call: Call, balancer: LoadBalancer, fallback: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call(balancer, "acquire", "planner", fallback=fallback)
    assert caught.value.argument == "fallback"


# The server is unreachable


@pytest.fixture
def nowhere(connect: Callable[..., Backend]) -> Backend:
    return connect("redis://127.0.0.1:1/0", deadline=0.1)


def test_unreachable_server_raises_by_default(call: Call, nowhere: Backend) -> None:
    balancer = LoadBalancer(backend=nowhere)
    for method in ("acquire", "select_instance"):
        with pytest.raises(BackendUnavailable):
            call(balancer, method, "planner")
    with pytest.raises(BackendUnavailable), call.inside(balancer, "lease", "planner"):
        pass


def test_unreachable_server_returns_nothing_under_none_policy(call: Call, nowhere: Backend) -> None:
    balancer = LoadBalancer(on_unavailable="none", backend=nowhere)
    assert call(balancer, "acquire", "planner", wait=30, fallback=("generalist",)) is None
    assert call(balancer, "select_instance", "planner") is None
    assert call(balancer, "release", None) is False
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "planner"):
        pass
    assert "is unreachable" in caught.value.reason
    assert caught.value.retry_after == 1.0
    with pytest.raises(BackendUnavailable):  # the policy does not apply to `status`
        call(balancer, "status")


def test_unknown_unavailability_policy_is_refused(perf: AgentPerf) -> None:
    for given in ("local", None, True):
        with pytest.raises(InvalidArgument) as caught:
            perf.balancer(on_unavailable=given)  # type: ignore[arg-type]
        assert caught.value.argument == "on_unavailable"
    assert perf.balancer(on_unavailable="none") is perf.balancer(on_unavailable="none")
    assert perf.balancer(on_unavailable="none") is not perf.balancer()


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis70", "redis82")
@pytest.mark.parametrize("policy", ["raise", "none"])
def test_stopped_server_blocks_no_caller_and_leaks_nothing(
    own_server: Server,
    connect: Callable[..., Backend],
    namespace: str,
    policy: Any,
    caplog: pytest.LogCaptureFixture,
    runner: asyncio.Runner,
) -> None:
    """Four threads and four tasks acquire in a loop. After the outage, each of them must get a lease again."""
    caplog.set_level(logging.WARNING, "agentperf_redis")
    balancer = LoadBalancer(on_unavailable=policy, backend=connect(own_server.url, deadline=DEADLINE_S))
    for number in range(4):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=5))
    kept = [balancer.acquire("planner") for _ in range(3)]
    answers: list[tuple[float, float, str]] = []
    granted_at: list[list[float]] = [[] for _ in range(8)]
    over = threading.Event()

    def note(number: int, begin: float, what: str) -> None:
        end = time.monotonic()
        answers.append((begin, end - begin, what))
        if what == "granted":
            granted_at[number].append(end)

    def caller(number: int) -> None:
        while not over.is_set():
            begin = time.monotonic()
            try:
                instance = balancer.acquire("planner")
                what = "granted" if instance else "none"
            except BackendUnavailable:
                instance, what = None, "raised"
            note(number, begin, what)
            with contextlib.suppress(BackendUnavailable):
                balancer.release(instance)
            time.sleep(0.005)

    async def task(number: int) -> None:
        while not over.is_set():
            begin = time.monotonic()
            try:
                instance = await balancer.aio.acquire("planner")
                what = "granted" if instance else "none"
            except BackendUnavailable:
                instance, what = None, "raised"
            note(number, begin, what)
            with contextlib.suppress(BackendUnavailable):
                await balancer.aio.release(instance)
            await asyncio.sleep(0.005)

    async def tasks() -> None:
        await asyncio.gather(*(task(number) for number in range(4, 8)))

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    callers.append(threading.Thread(target=lambda: runner.run(tasks())))
    with StallDetector() as stalls:
        for each in callers:
            each.start()
        wait_until(lambda: len(answers) > 50, "calls")
        own_server.pause()
        stopped = time.monotonic()
        time.sleep(5.0)
        resumed = time.monotonic()
        own_server.resume()
        wait_until(
            lambda: all(times and times[-1] > resumed for times in granted_at), "each caller to be granted again"
        )
        over.set()
        for each in callers:
            each.join(DEADLINE_S * 3)
            assert not each.is_alive()

    meanwhile = {what for at, took, what in answers if stopped + 0.1 < at and at + took < resumed}
    # A command ends at its deadline. Its caller then waits for the CPU, which seven other callers, the server and other
    # programs also need. The bound allows 0.3 s for this wait.
    assert max(stalls.own(at, at + took) for at, took, _ in answers) < DEADLINE_S + 0.3
    assert meanwhile == {"raised" if policy == "raise" else "none"}
    assert sum(stopped + 0.1 < at < resumed - DEADLINE_S for at, _, _ in answers) > 8
    assert max(stalls.own(resumed, next(at for at in times if at > resumed)) for times in granted_at) < 1.0
    with own_server.client() as raw:
        wait_for_load(raw, namespace, len(kept))
    for instance in kept:
        assert instance is not None
        assert balancer.release(instance)
    assert any("unavailable" in text or "answer" in text for text in caplog.messages)


def test_cancelled_caller_does_not_wait_for_unreachable_server(
    own_server: Server, connect: Callable[..., Backend], namespace: str, runner: asyncio.Runner
) -> None:
    balancer = LoadBalancer(backend=connect(own_server.url, deadline=DEADLINE_S))
    balancer.register_instance(AgentInstance("p0", "planner"))

    async def give_up() -> float:
        await balancer.aio.release(await balancer.aio.acquire("planner"))
        own_server.pause()
        with StallDetector() as stalls:
            begin = time.monotonic()
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await balancer.aio.acquire("planner")
                return stalls.own(begin, time.monotonic())
            finally:
                own_server.resume()

    assert runner.run(give_up()) < 0.9
    assert balancer.acquire("planner") is not None
    with own_server.client() as raw:
        # The test dropped the lease of the last call. The cancelled call may have got a lease too. Each of these leases
        # is released in the background.
        wait_for_load(raw, namespace, 0)


def wait_for_load(raw: Raw, namespace: str, held: int) -> None:
    """Wait until the load equals the number of held leases. Abandoned requests are undone in the background."""
    state = keys.pool(namespace, "planner").state

    def counts() -> tuple[int, int, int]:
        fields = raw.hgetall(state)
        leases = len(records.held(fields))
        loads = sum(int(record["load"]) for record in records.instances(fields).values())
        return leases, loads, int(fields["#load"])

    wait_until(lambda: counts() == (held, held, held), f"load to be the {held} live leases")


def test_lost_instances_are_registered_again_and_logged(
    own_server: Server, connect: Callable[..., Backend], caplog: pytest.LogCaptureFixture
) -> None:
    balancer = LoadBalancer(on_unavailable="none", backend=connect(own_server.url, deadline=DEADLINE_S))
    for number in range(3):
        balancer.register_instance(AgentInstance(f"p{number}", "planner"))
    with own_server.client() as client:
        client.flushall()
    wait_until(lambda: balancer.acquire("planner") is not None, "a lease again")
    (pool,) = balancer.status("planner")
    assert len(pool.instances) == 3
    assert "registered 3 instances of planner again after the server lost them" in caplog.messages
