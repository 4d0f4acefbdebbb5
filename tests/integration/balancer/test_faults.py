"""Faults between a process and its leases: lost replies, late requests, cancellation, crashes, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, commands
from agentperf_redis.balancer.lease_keeper import lease_keeper_of
from agentperf_redis.errors import BackendFull, BackendUnavailable, LeaseLost
from tests.support import records
from tests.support.calls import Call
from tests.support.forks import in_child
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, hurry
from tests.support.workers import Workers

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


def balancer_with(backend: Backend, **facts: Any) -> LoadBalancer:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", **{"max_capacity": 3, **facts}))
    return balancer


def leases(raw: Raw, pool: keys.PoolKeys) -> list[str]:
    return records.held(raw.hgetall(pool.state))


def keep(kept: list[Any], instance: AgentInstance | None) -> bool:
    kept.append(instance)
    return instance is not None


def load(raw: Raw, pool: keys.PoolKeys) -> int:
    return int(records.number(raw.hget(pool.state, "p0"), "load"))


def warm_up(call: Call, balancer: LoadBalancer) -> None:
    """Load the scripts of acquire and release, so that the next call of each needs only one request."""
    assert call(balancer, "release", call(balancer, "acquire", "planner"))


@pytest.mark.parametrize("fault", ["reset_after_reply", "half_reply", "swallow", "reset_before_request"])
def test_lost_reply_changes_nothing_twice(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys, fault: str
) -> None:
    balancer = balancer_with(connect(proxy.url, deadline=2.0 if fault == "swallow" else 5.0))
    warm_up(call, balancer)

    met = getattr(proxy, fault)(only=commands.ACQUIRE)
    instance = call(balancer, "acquire", "planner")
    assert met.caught.is_set()
    assert proxy.count(commands.ACQUIRE) >= 2
    assert leases(raw, pool) == [instance.lease.token]
    assert load(raw, pool) == 1
    assert raw.hget(pool.state, "#picks") == "2"

    met = getattr(proxy, fault)(only=commands.RELEASE)
    assert call(balancer, "release", instance, outcome="error") is True
    assert met.caught.is_set()
    assert leases(raw, pool) == []
    assert load(raw, pool) == 0
    assert records.number(raw.hget(pool.state, "p0"), "failed") == 1


def test_late_copy_after_release_is_refused(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(connect(proxy.url))
    warm_up(call, balancer)
    held = proxy.hold(only=commands.ACQUIRE)

    # The retry is granted while the first copy of the request is still delayed.
    instance = call(balancer, "acquire", "planner")
    assert records.fields(raw.hget(pool.state, instance.lease.token))["late"] == "1"
    assert call(balancer, "release", instance) is True
    assert held.deliver() == b"*2\r\n:-1\r\n$8\r\nreleased\r\n"

    assert leases(raw, pool) == []
    assert load(raw, pool) == 0


def test_request_after_its_deadline_is_refused(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys, kept: list[object]
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend)
    kept.append(call(balancer, "acquire", "planner"))
    hurry(backend, 0.3)
    held = proxy.hold(only=commands.ACQUIRE, reset=False)

    with pytest.raises(BackendUnavailable) as caught:
        call(balancer, "acquire", "planner")
    assert caught.value.outcome == "unknown"
    token = held.requests[0][9].decode()
    wait_until(lambda: raw.hget(pool.state, token) == "tombstone why=cancelled", "the keeper to write the tombstone")
    assert b":-1" in held.deliver()

    assert token not in leases(raw, pool)
    assert load(raw, pool) == 1


def test_keeper_repeats_an_unanswered_release(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend)
    instance = call(balancer, "acquire", "planner")
    hurry(backend, 0.2)
    proxy.close_port()
    proxy.cut()
    with pytest.raises(BackendUnavailable):
        call(balancer, "release", instance)
    proxy.open_port()
    wait_until(lambda: load(raw, pool) == 0, "the release to be executed")
    assert leases(raw, pool) == []


@pytest.mark.parametrize("error", [None, ValueError("the user's own")])
def test_block_ends_normally_during_an_outage(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys, error: Exception | None
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend)
    with (
        contextlib.nullcontext() if error is None else pytest.raises(ValueError, match="own") as caught,
        call.inside(balancer, "lease", "planner", ttl=60.0) as lease,  # the block ends long before the lease expires
    ):
        hurry(backend, 0.2)
        proxy.close_port()
        proxy.cut()
        with pytest.raises(BackendUnavailable):
            call(balancer, "status", "planner")
        if error is not None:
            raise error
    assert caught is None or caught.value is error
    assert not lease.held
    assert lease_keeper_of(backend).held() == []
    assert load(raw, pool) == 1

    proxy.open_port()
    wait_until(lambda: load(raw, pool) == 0, "the keeper to release the lease")
    assert leases(raw, pool) == []


@pytest.mark.thorough
@pytest.mark.parametrize("late", ["mark_unhealthy", "update_instance", "register_instance", "remove_instance"])
def test_change_after_its_deadline_has_no_effect(
    call: Call, connect: Connect, proxy: Proxy, server: Server, raw: Raw, pool: keys.PoolKeys, late: str
) -> None:
    other = balancer_with(connect(server.url))
    backend = connect(proxy.url)
    slow = LoadBalancer(backend=backend)
    assert call(slow, "mark_healthy", "planner", "p0")
    # This call loads the script of `remove_instance` and lets the client estimate the server's clock.
    assert not call(slow, "remove_instance", "planner", "unknown")
    hurry(backend, 0.45)
    args: dict[str, tuple[Any, ...]] = {
        "register_instance": (AgentInstance("p0", "planner", max_capacity=9, is_healthy=False),)
    }
    script = {"register_instance": commands.REGISTER, "remove_instance": commands.REMOVE}.get(late, commands.UPDATE)
    options = {"max_capacity": 9} if late == "update_instance" else {}
    held = proxy.hold(only=script, reset=False)
    with pytest.raises(BackendUnavailable) as caught:
        call(slow, late, *args.get(late, ("planner", "p0")), **options)
    assert caught.value.outcome == "unknown"
    assert call(other, "mark_healthy", "planner", "p0")
    before = raw.hget(pool.state, "p0")
    request = held.wait()
    position = [slot.name for slot in script.header.argv].index("until_ms")
    until_ms = int(request[3 + int(request[2]) + position])  # order: EVALSHA, hash, number of keys, keys, arguments
    wait_until(lambda: raw.time()[0] * 1000 > until_ms, "the server's clock to pass the limit")
    assert held.deliver().startswith(b"*2\r\n:-6\r\n")
    assert raw.hget(pool.state, "p0") == before
    assert raw.zcard(pool.ids) == 1


def test_cancelled_acquire_leaves_no_lease_at_any_point(
    connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(server.url)
    balancer = balancer_with(backend, max_capacity=1000)
    granted: list[object] = []

    async def cancel_after(steps: int) -> None:
        task = asyncio.ensure_future(balancer.aio.acquire("planner"))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        try:
            granted.append(await task)
        except asyncio.CancelledError:
            return

    async def main() -> None:
        await balancer.aio.status()
        for steps in range(40):
            await cancel_after(steps)
        await backend.aclose()

    asyncio.run(main())
    # Some calls got a lease before they were cancelled. Closing the backend released these leases. The other calls got
    # no lease.
    assert leases(raw, pool) == []
    assert load(raw, pool) == 0


def test_cancelled_release_still_frees_the_unit(
    connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(server.url)
    balancer = balancer_with(backend, max_capacity=1000)

    async def main() -> None:
        for steps in range(30):
            instance = await balancer.aio.acquire("planner")
            assert instance is not None
            task = asyncio.ensure_future(balancer.aio.release(instance))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        while load(raw, pool):
            await asyncio.sleep(0.01)
        await backend.aclose()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert leases(raw, pool) == []


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda instance: pickle.loads(pickle.dumps(instance)),
    "replace": lambda instance: dataclasses.replace(instance, weight=2.0),
    "asdict": lambda instance: AgentInstance(**dataclasses.asdict(instance)),
    "lease": lambda instance: pickle.loads(pickle.dumps([copy.deepcopy(copy.copy(instance.lease))]))[0].instance,
}


@pytest.mark.thorough
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_of_an_instance_carries_its_lease(
    call: Call, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, copied: Callable[[Any], Any]
) -> None:
    balancer = balancer_with(connect(server.url))
    instance = call(balancer, "acquire", "planner")
    other = copied(instance)
    assert other.lease is instance.lease
    assert dataclasses.replace(other, weight=instance.weight) == instance
    del instance
    gc.collect()
    assert other.lease.held, "the lease lives as long as any of the copies"
    assert (call(balancer, "release", other), load(raw, pool)) == (True, 0)
    assert call(balancer, "release", copied(other)) is False


def release_pickled(url: str, namespace: str, data: bytes) -> tuple[bool, ...]:
    instance = pickle.loads(data)
    with AgentPerf(url, namespace=namespace) as perf:
        released = perf.balancer().release(instance)
        lease = instance.lease
        lease.check()
        return lease.held, lease.remaining > 0, released, perf.balancer().release_token("planner", lease.token)


def test_pickled_lease_is_not_held_in_another_process(
    call: Call, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, workers: Workers, namespace: str
) -> None:
    balancer = balancer_with(connect(server.url))
    instance = call(balancer, "acquire", "planner", tokens=7)
    instance.lease.outcome = "error"
    data = pickle.dumps(instance)
    assert workers.run(release_pickled, [(server.url, namespace, data)]) == [(False, False, False, True)]
    assert load(raw, pool) == 0, "release_token ends a lease of any process"
    call(balancer, "release", instance)

    after = pickle.loads(data)
    assert after == instance
    facts = ("agent_type", "token", "fence", "ttl", "tokens", "outcome", "instance_id")
    assert [getattr(after.lease, fact) for fact in facts] == [getattr(instance.lease, fact) for fact in facts]
    assert (after.lease.held, "copy" in repr(after.lease)) == (False, True), "a pickle of an ended lease holds nothing"


def test_unreferenced_lease_is_released_with_a_warning(
    call: Call,
    connect: Connect,
    server: Server,
    raw: Raw,
    pool: keys.PoolKeys,
    caplog: pytest.LogCaptureFixture,
) -> None:
    balancer = balancer_with(connect(server.url))
    instance = call(balancer, "acquire", "planner")
    assert load(raw, pool) == 1
    held = [instance]
    del instance

    def drop() -> None:
        held.clear()
        gc.collect()  # reference cycles of finished tasks may include the lease

    with pytest.warns(ResourceWarning, match="held, .* was dropped without release"):
        drop()
    wait_until(lambda: load(raw, pool) == 0, "the keeper to release the lease")
    assert "'p0' of 'planner' was released because nothing refers to it" in caplog.text
    assert leases(raw, pool) == []


def test_closing_releases_held_leases(
    call: Call, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, kept: list[object]
) -> None:
    backend = connect(server.url)
    balancer = balancer_with(backend)
    instance = call(balancer, "acquire", "planner")
    kept.append(instance)
    backend.close()
    assert load(raw, pool) == 0
    assert not instance.lease.held


@pytest.mark.thorough
def test_closing_runs_pending_retries_first(
    call: Call, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend)
    instance = call(balancer, "acquire", "planner")
    hurry(backend, 0.2)
    proxy.close_port()
    proxy.cut()
    with pytest.raises(BackendUnavailable):
        call(balancer, "release", instance)
    keeper = lease_keeper_of(backend)
    wait_until(
        lambda: any(isinstance(job, partial) for job in list(keeper.jobs._due_times)),
        "the keeper to have failed once",
    )
    proxy.open_port()
    hurry(backend, 5.0)
    backend.close()
    assert load(raw, pool) == 0
    assert leases(raw, pool) == []


def test_lease_dropped_just_before_closing_is_released(
    connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(server.url)
    balancer = balancer_with(backend)
    keeper = lease_keeper_of(backend)
    gate = threading.Event()
    held = [balancer.acquire("planner")]
    keeper.jobs.put(gate.wait)  # blocks the thread, so that later jobs stay queued
    with pytest.warns(ResourceWarning):
        held.clear()
    threading.Timer(0.1, gate.set).start()
    backend.close()
    assert load(raw, pool) == 0


def test_lease_granted_while_closing_is_released(
    call: Call, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys
) -> None:
    backend = connect(server.url)
    balancer = balancer_with(backend)
    # `Backend.close` closes the lease keeper before the connections. This test closes only the keeper, so the reply to
    # `acquire` still arrives.
    lease_keeper_of(backend).close()
    with pytest.raises(BackendUnavailable, match="closed"):
        call(balancer, "acquire", "planner")
    assert load(raw, pool) == 0
    assert leases(raw, pool) == []


def server_ms(raw: Raw) -> int:
    seconds, micros = raw.time()
    return int(seconds) * 1000 + int(micros) // 1000


def hold_one(url: str, namespace: str, ttl: float) -> Generator[str, None, bool]:
    backend = Backend(url, namespace=namespace)
    balancer = LoadBalancer(backend=backend)
    instance = balancer.acquire("planner", ttl=ttl)
    assert instance is not None
    assert instance.lease is not None
    yield instance.lease.token
    freed = balancer.release(instance)
    backend.close()
    return freed


def test_killed_process_frees_its_capacity_within_ttl(
    workers: Workers, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, kept: list[object]
) -> None:
    balancer = balancer_with(connect(server.url), max_capacity=1)
    ttl = 2.4
    worker = workers.start(hold_one, server.url, balancer._backend.namespace, ttl)
    token = worker.said()
    assert token.split(":")[1] == str(worker.pid)
    first_end = raw.zscore(pool.due, token)
    wait_until(lambda: server_ms(raw) > first_end, "the TTL to pass")  # meanwhile, the worker renews the lease
    assert balancer.acquire("planner") is None

    with StallDetector(raw.ping) as stalls:
        worker.kill()
        killed_at = time.monotonic()
        wait_until(lambda: keep(kept, balancer.acquire("planner")), "the capacity to become free")
        assert stalls.own(killed_at, time.monotonic()) < ttl + 1.0
    assert raw.hget(pool.state, token) == "tombstone why=expired"


def test_paused_process_notices_that_its_lease_is_lost(
    workers: Workers, connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    balancer = balancer_with(connect(server.url), max_capacity=1)
    worker = workers.start(hold_one, server.url, balancer._backend.namespace, 0.2)
    worker.said()
    worker.pause()
    wait_until(lambda: keep(kept, balancer.acquire("planner")), "the capacity to become free")
    worker.resume()
    worker.answer()
    assert worker.result() is False
    assert kept[-1].lease.held
    assert leases(raw, pool) == [kept[-1].lease.token]


def test_empty_restart_restores_instances_and_loses_leases(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys, kept: list[object]
) -> None:
    backend = connect(own_server.url)
    balancer = balancer_with(backend)
    losses: list[LeaseLost] = []
    instance = call(balancer, "acquire", "planner", on_lost=losses.append)
    kept.append(instance)
    assert balancer.update_instance("planner", "p0", max_capacity=2)
    fence = instance.lease.fence

    own_server.restart()

    def again() -> bool:
        kept.append(call(balancer, "acquire", "planner"))
        return kept[-1] is not None

    wait_until(again, "the instance to be registered again")
    wait_until(lambda: losses, "the loss to be reported")
    assert "lost its data" in losses[0].reason
    assert call(balancer, "release", instance) is False
    new: Any = kept[-1]
    assert (new.max_capacity, new.current_load) == (2, 1)
    assert new.lease.fence > fence


def registered_ids(server: Server, pool: keys.PoolKeys) -> set[str]:
    with server.client() as raw:
        return set(raw.zrange(pool.ids, 0, -1))


@pytest.mark.thorough
def test_idle_registrar_restores_instances_after_empty_restart(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(connect(own_server.url))
    call(balancer, "register_instance", AgentInstance("p1", "planner"))
    call(balancer, "register_instance", AgentInstance("p2", "planner", is_healthy=False))
    call(balancer, "mark_unhealthy", "planner", "p0")
    call(balancer, "drain", "planner", "p1")
    call(balancer, "mark_healthy", "planner", "p2")
    own_server.restart()
    wait_until(lambda: registered_ids(own_server, pool) == {"p0", "p1", "p2"}, "the keeper to register them again")
    found = {each.id: (each.is_healthy, each.is_draining) for each in balancer.instances["planner"]}
    assert found == {"p0": (False, False), "p1": (True, True), "p2": (True, False)}


@pytest.mark.thorough
def test_first_call_restores_a_pool_after_flush(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys, kept: list[object]
) -> None:
    backend = connect(own_server.url)
    balancer = balancer_with(backend)
    with own_server.client() as raw:
        raw.flushall()
        kept.append(call(balancer, "acquire", "planner"))
        assert kept[-1] is not None
        raw.flushall()
        assert list(call(balancer, "get_status")) == ["planner"]
        raw.flushall()
        wait_until(lambda: registered_ids(own_server, pool) == {"p0"}, "the keeper to notice without a call")
        assert call(LoadBalancer(backend=connect(own_server.url)), "get_status")["planner"]["instances"] == 1


@pytest.mark.thorough
def test_each_process_restores_its_own_instances(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys
) -> None:
    first = balancer_with(connect(own_server.url))
    second = LoadBalancer(backend=connect(own_server.url))
    call(second, "register_instance", AgentInstance("p1", "planner"))
    with own_server.client() as raw:
        raw.flushall()
    # The other process may already have registered its instance again.
    assert call(first, "get_status")["planner"]["instances"] in (1, 2)
    wait_until(lambda: registered_ids(own_server, pool) == {"p0", "p1"}, "the other process to register its instance")


def test_instance_removed_by_another_process_stays_removed(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys
) -> None:
    backend = connect(own_server.url)
    balancer = balancer_with(backend)
    other = LoadBalancer(backend=connect(own_server.url))
    assert call(other, "remove_instance", "planner", "p0")
    assert call(balancer, "acquire", "planner") is None
    assert call(balancer, "get_status") == {}
    assert lease_keeper_of(backend).registrations.registered == {}
    assert registered_ids(own_server, pool) == set()


def test_unrenewable_lease_is_lost_before_its_reuse(
    call: Call, connect: Connect, proxy: Proxy, kept: list[object]
) -> None:
    backend = connect(proxy.url)
    balancer = balancer_with(backend)
    losses: list[LeaseLost] = []
    instance = call(balancer, "acquire", "planner", ttl=0.6, on_lost=losses.append)
    kept.append(instance)
    hurry(backend, 0.1)
    proxy.close_port()
    wait_until(lambda: losses, "the loss to be noticed")
    assert "renewed in time" in losses[0].reason
    proxy.open_port()


@pytest.mark.thorough
def test_full_server_accepts_releases_and_renewals(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys, kept: list[object]
) -> None:
    balancer = balancer_with(connect(own_server.url))
    lost: list[LeaseLost] = []
    held = [call(balancer, "acquire", "planner", ttl=2.4, on_lost=lost.append) for _ in range(3)]
    kept += held
    with own_server.client() as raw:
        before = {token: raw.zscore(pool.due, token) for token in leases(raw, pool)}
        raw.config_set("maxmemory", 1)
        assert call(balancer, "release", held[2], outcome="error") is True
        with pytest.raises(BackendFull):
            call(balancer, "acquire", "planner")
        assert call(balancer, "release", held[0]) is True
        token = held[1].lease.token
        wait_until(lambda: raw.zscore(pool.due, token) > before[token] + 1200, "two renewals")
        assert call(balancer, "heartbeat", "planner", "p0") == []
        assert load(raw, pool) == 1
    assert lost == []


def test_scripts_flushed_from_the_server_are_reloaded(
    call: Call, own_server: Server, connect: Connect, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(connect(own_server.url))
    with own_server.client() as raw:
        for _ in range(2):
            raw.script_flush()
            instance = call(balancer, "acquire", "planner")
            raw.script_flush()
            assert call(balancer, "release", instance) is True
        assert [field for field in raw.hkeys(pool.state) if field.startswith("@")] == []


def test_forked_child_leaves_its_parents_leases_alone(
    connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys
) -> None:
    balancer = balancer_with(connect(server.url))
    instance = balancer.acquire("planner", ttl=6.0)
    assert instance is not None
    held = [instance]
    del instance

    def child() -> None:
        held.clear()
        gc.collect()
        own = balancer.acquire("planner", ttl=2.4)
        time.sleep(2.5)  # longer than the TTL, so the lease must be renewed
        assert own is not None
        assert balancer.release(own)

    in_child(child)
    assert load(raw, pool) == 1
    assert balancer.release(held.pop()) is True


@pytest.mark.thorough
@pytest.mark.parametrize("ending", ["block", "release", "error"])
def test_child_forked_within_a_block_keeps_parents_lease(
    connect: Connect, server: Server, raw: Raw, pool: keys.PoolKeys, ending: str
) -> None:
    balancer = balancer_with(connect(server.url))
    block = balancer.lease("planner", ttl=1.2)
    with block as lease:

        def child() -> None:
            assert not lease.held
            lease.check()
            if ending == "release":
                assert balancer.release(lease) is False
            elif ending == "error":
                block.__exit__(KeyError, KeyError(), None)
            else:
                block.__exit__(None, None, None)

        in_child(child)
        assert load(raw, pool) == 1
        time.sleep(1.3)  # longer than the TTL, so the parent must continue to renew the lease
        lease.check()
        assert load(raw, pool) == 1
    assert load(raw, pool) == 0


def test_interrupted_acquire_releases_its_lease(connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys) -> None:
    balancer = balancer_with(connect(proxy.url))
    warm_up(Call(None), balancer)
    fault = proxy.swallow(only=commands.ACQUIRE)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_when_under_way() -> None:
        fault.wait()
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupting = threading.Thread(target=interrupt_when_under_way)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            balancer.acquire("planner")
        interrupting.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    token = fault.requests[0][9].decode()
    assert raw.hget(pool.state, token) == "tombstone why=released"
    assert load(raw, pool) == 0
