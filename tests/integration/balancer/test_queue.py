"""The queue: waiters get leases in order of arrival, none is lost, and nothing is left behind."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, Lease, LoadBalancer, commands
from agentperf_redis.balancer.commands import ANY, Granted, Pool, Queued, Spent
from agentperf_redis.errors import NoCapacity
from tests.support import records
from tests.support.calls import Call
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, gone, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers

Connect = Callable[..., Backend]


@pytest.fixture(autouse=True)
def kept() -> Iterator[list[Any]]:
    """A list that keeps leases until the backends are closed. A dropped lease would be released with a warning."""
    held: list[Any] = []
    yield held
    held.clear()


@pytest.fixture
def pool(namespace: str) -> keys.PoolKeys:
    return keys.pool(namespace, "planner")


@pytest.fixture
def balancer(backend: Backend) -> LoadBalancer:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    return balancer


def nothing_left(raw: Raw, pool: keys.PoolKeys) -> None:
    assert raw.zcard(pool.waitq) == 0
    state = raw.hgetall(pool.state)
    tokens = [record for name, record in state.items() if name[0] == "@"]
    assert [record for record in tokens if records.kind_of(record) != "tombstone"] == []
    assert raw.hget(pool.state, "#load") == "0"
    assert records.number(state["p0"], "load") == 0


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_waiter_gets_the_released_unit(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    assert first.lease is not None
    kept.append(first)
    released_at: list[float] = []

    def release() -> None:
        wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to join the queue")
        released_at.append(time.monotonic())
        assert balancer.release(first)

    with StallDetector() as stalls:
        thread, _ = in_background(release)
        second = call(balancer, "acquire", "planner", wait=20)
        thread.join()
        # A message woke the waiter. Without a message, the waiter would have waited up to a second for its next poll.
        assert stalls.own(released_at[0], time.monotonic()) < 0.8
    assert second.lease.fence > first.lease.fence
    assert call(balancer, "release", second)
    assert raw.hget(pool.state, second.lease.token) == "tombstone why=released"
    nothing_left(raw, pool)


def test_waiter_leaves_the_queue_after_its_wait(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    kept.append(balancer.acquire("planner"))
    with StallDetector(raw.ping) as stalls:
        begin = time.monotonic()
        assert call(balancer, "acquire", "planner", wait=0.2) is None
        with pytest.raises(NoCapacity), call.inside(balancer, "lease", "planner", wait=0.1):
            raise AssertionError
        end = time.monotonic()
        assert end - begin >= 0.3
        assert stalls.own(begin, end) < 2
    assert raw.zcard(pool.waitq) == 0
    assert call(balancer, "release", kept[0])
    nothing_left(raw, pool)


def test_waiter_gets_the_first_registered_instance(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    balancer = LoadBalancer(backend=backend)

    def register() -> None:
        wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to join the queue")
        balancer.register_instance(AgentInstance("p0", "planner"))

    thread, _ = in_background(register)
    kept.append(call(balancer, "acquire", "planner", wait=math.inf))
    thread.join()
    assert kept[0].id == "p0"


def test_non_waiting_acquire_does_not_jump_the_queue(balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    thread, results = in_background(lambda: balancer.acquire("planner", wait=20))
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to join the queue")
    assert balancer.release(first)
    assert balancer.acquire("planner") is None
    thread.join()
    assert balancer.release(results[0])
    nothing_left(raw, pool)


@pytest.fixture
def wait_in_order(
    call: Call, runner: asyncio.Runner, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> Callable[[list[int]], list[int]]:
    """A function that takes a list of priorities, and starts a caller with each priority, one after the other.

    It returns the order in which the callers got their leases.
    """
    grants_seen: list[int] = []

    def by_threads(priorities: list[int]) -> list[int]:
        def take(number: int, priority: int) -> None:
            with balancer.lease("planner", wait=30, priority=priority):
                grants_seen.append(number)

        first = balancer.acquire("planner")
        threads = []
        for number, priority in enumerate(priorities):
            threads.append(threading.Thread(target=take, args=(number, priority)))
            threads[-1].start()
            wait_until(lambda: raw.zcard(pool.waitq) == len(threads), "the next waiter to join the queue")
        assert balancer.release(first)
        for thread in threads:
            thread.join()
        return grants_seen

    async def by_tasks(priorities: list[int]) -> list[int]:
        async def take(number: int, priority: int) -> None:
            async with balancer.aio.lease("planner", wait=30, priority=priority):
                grants_seen.append(number)

        first = await balancer.aio.acquire("planner")
        tasks = []
        async with asyncio.timeout(30):
            for number, priority in enumerate(priorities):
                tasks.append(asyncio.create_task(take(number, priority)))
                while raw.zcard(pool.waitq) != len(tasks):
                    await asyncio.sleep(0.002)
            assert await balancer.aio.release(first)
            await asyncio.gather(*tasks)
        return grants_seen

    return (lambda priorities: runner.run(by_tasks(priorities))) if call.is_async else by_threads


def test_waiters_are_granted_in_order_of_arrival(
    wait_in_order: Callable[[list[int]], list[int]], raw: Raw, pool: keys.PoolKeys
) -> None:
    assert wait_in_order([0] * 12) == list(range(12))
    nothing_left(raw, pool)


def test_priority_counts_as_earlier_arrival(
    wait_in_order: Callable[[list[int]], list[int]], raw: Raw, pool: keys.PoolKeys
) -> None:
    assert wait_in_order([0, 0, 100, 200, -100, 100]) == [3, 2, 5, 0, 1, 4]
    nothing_left(raw, pool)


def test_waiter_with_rare_label_does_not_block_others(
    backend: Backend, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    balancer.register_instance(AgentInstance("gpu", "planner", max_capacity=1, labels=frozenset({"gpu"})))
    held = {
        instance.id: instance for instance in (balancer.acquire("planner"), balancer.acquire("planner")) if instance
    }
    rare, rare_results = in_background(lambda: balancer.acquire("planner", wait=30, require={"gpu"}))
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the first waiter to join the queue")
    plain, plain_results = in_background(lambda: balancer.acquire("planner", wait=30))
    wait_until(lambda: raw.zcard(pool.waitq) == 2, "the second waiter to join the queue")
    balancer.release(held["p0"])
    plain.join()
    assert plain_results[0].id == "p0"
    assert rare.is_alive()
    balancer.release(held["gpu"])
    rare.join()
    assert rare_results[0].id == "gpu"
    assert balancer.release(plain_results[0])
    assert balancer.release(rare_results[0])
    nothing_left(raw, pool)


def test_waiting_works_without_the_bus(
    balancer: LoadBalancer, connect: Connect, proxy: Proxy, raw: Raw, pool: keys.PoolKeys
) -> None:
    other = LoadBalancer(backend=connect(proxy.url))
    first = balancer.acquire("planner")
    assert first is not None
    thread, results = in_background(lambda: other.acquire("planner", wait=30))
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to join the queue")
    other._operations.queues._channels[pool.waitq].close()
    assert balancer.release(first)
    thread.join(10)
    assert other.release(results[0])
    nothing_left(raw, pool)


def test_cancelled_wait_leaves_nothing_at_any_point(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    async def once(pause: float) -> None:
        holder = await balancer.aio.acquire("planner")
        assert holder is not None
        waiter = asyncio.ensure_future(balancer.aio.acquire("planner", wait=30))
        await asyncio.sleep(0.02)
        release = asyncio.ensure_future(balancer.aio.release(holder))
        await asyncio.sleep(pause)  # let the grant and the cancellation happen at about the same time
        waiter.cancel()
        try:
            instance = await waiter
        except asyncio.CancelledError:
            pass
        else:
            assert instance is not None
            await balancer.aio.release(instance)
        await release

    async def main() -> None:
        for step in range(40):
            await once(step * 0.0001)
        await backend.aclose()

    asyncio.run(main())
    nothing_left(raw, pool)


# The tests in this section call the script wait.lua directly. So a waiter polls only when a test calls the script.


def poll(
    backend: Backend,
    token: str,
    position: str = "-",
    *,
    ttl_ms: int = 10_000,
    live_ms: int = 10_000,
    boost_ms: int = 0,
    require: str = "",
) -> Any:
    pool = Pool.of(backend.namespace, "planner")
    needs = frozenset({require} if require else ())
    return backend.run(
        commands.wait(pool, token, ttl_ms=ttl_ms, live_ms=live_ms, boost_ms=boost_ms, require=needs, position=position)
    )


def test_priority_starves_no_waiter(balancer: LoadBalancer, backend: Backend, kept: list[Any]) -> None:
    kept.append(balancer.acquire("planner"))
    assert isinstance(poll(backend, "@first"), Queued)
    arrived_at = time.monotonic()
    assert poll(backend, "@urgent", boost_ms=60_000).ahead == 0
    wait_until(lambda: time.monotonic() - arrived_at > 1.05, "the time of one priority point to pass")
    assert poll(backend, "@late and urgent", boost_ms=1000).ahead == 2
    assert poll(backend, "@first").ahead == 1


@pytest.mark.parametrize("ahead", [5, 40, 100])
def test_many_waiters_with_rare_labels_keep_the_order(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys, ahead: int
) -> None:
    held = balancer.acquire("planner")
    for number in range(ahead):
        assert isinstance(poll(backend, f"@rare{number}", require="fr" if number % 7 else "gpu"), Queued)
    assert poll(backend, "@first").ahead == ahead
    assert poll(backend, "@second").ahead == ahead + 1
    assert balancer.release(held)
    assert balancer.acquire("planner") is None
    assert isinstance(poll(backend, "@first"), Granted)
    assert backend.run(commands.release(Pool.of(backend.namespace, "planner"), "@first"))
    assert balancer.acquire("planner") is None
    assert isinstance(poll(backend, "@second"), Granted)

    balancer.register_instance(AgentInstance("french", "planner", max_capacity=ahead, labels=frozenset({"fr"})))
    french = [f"@rare{number}" for number in range(ahead) if number % 7]
    for _ in range(0, len(french), 16):  # each run of the script grants to at most 16 waiters
        assert isinstance(poll(backend, "@rare0", require="gpu"), Queued)
    grants = {token: records.fields(raw.hget(pool.state, token)) for token in french}
    assert {grant["instance"] for grant in grants.values()} == {"french"}
    assert sorted(french, key=lambda token: int(grants[token]["fence"])) == french


def test_dead_waiter_is_skipped(balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    assert isinstance(poll(backend, "@dead", live_ms=50), Queued)
    assert isinstance(poll(backend, "@living"), Queued)
    wait_until(lambda: poll(backend, "@living").ahead == 0, "the dead waiter to lose its position")
    assert balancer.release(first)
    assert isinstance(poll(backend, "@living"), Granted)
    assert not raw.hexists(pool.state, "@dead")


@pytest.mark.parametrize("dead", [3, 20, 60])
def test_freed_capacity_skips_dead_waiters(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys, dead: int
) -> None:
    """A single call removes only a few dead waiters. Some cases have many more dead waiters than that."""
    first = balancer.acquire("planner")
    assert first is not None
    assert first.lease is not None
    for number in range(dead):
        assert isinstance(poll(backend, f"@dead{number}"), Queued)
    expiries = {f"W@dead{number}": 2 + number for number in range(dead)}
    # The lease expires before the waiters, so the script processes the lease first.
    raw.zadd(pool.due, {first.lease.token: 1, **expiries}, xx=True)
    raw.hset(pool.state, "#next", 0)

    assert isinstance(
        backend.run(commands.acquire(Pool.of(backend.namespace, "planner"), "@next", 10_000, ANY)), Granted
    )

    assert [record for record in raw.hvals(pool.state) if records.kind_of(record) == "grant"] == []
    assert not balancer.release(first)


@pytest.mark.parametrize("tombstones", [1, 31, 200])
def test_expiring_tombstones_do_not_wake_waiters(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys, kept: list[Any], tombstones: int
) -> None:
    kept.append(balancer.acquire("planner", ttl=600.0))

    def now_ms() -> int:
        seconds, microseconds = raw.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    due_ms = [now_ms() + 400 + 10 * number for number in range(tombstones)]
    raw.hset(pool.state, mapping={f"@gone{number}": "tombstone why=released" for number in range(tombstones)})
    raw.zadd(pool.due, {f"X@gone{number}": at for number, at in enumerate(due_ms)})

    def minimum() -> float:
        """Return a lower bound for the `retry_after` of a reply. The script skips at most 31 tombstones."""
        return 0.8 if tombstones < 32 else (due_ms[31] - now_ms()) / 1000 - 0.002

    retry_after = poll(backend, "@first").retry_after
    assert min(0.8, minimum()) < retry_after <= 1.0
    with pytest.raises(NoCapacity) as caught, balancer.lease("planner"):
        raise AssertionError
    assert caught.value.retry_after > min(0.8, minimum())


def test_unfetched_grant_moves_on_and_waiter_keeps_position(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    slow = poll(backend, "@slow")
    poll(backend, "@second")
    third = poll(backend, "@third")
    assert balancer.release(first)
    assert raw.hget(pool.state, "@slow").startswith("grant instance=p0 ")
    raw.zadd(pool.due, {"@slow": 1})  # as if the three seconds to fetch the grant had passed
    raw.hset(pool.state, "#next", 1)
    assert isinstance(poll(backend, "@second"), Granted)
    assert raw.hget(pool.state, "@slow") == "tombstone why=unfetched"
    again = poll(backend, "@slow", position=slow.position)
    assert isinstance(again, Queued)
    assert (again.ahead, poll(backend, "@third", position=third.position).ahead) == (0, 1)


def test_expired_fetched_lease_is_spent(balancer: LoadBalancer, backend: Backend, raw: Raw) -> None:
    assert isinstance(poll(backend, "@t", ttl_ms=30), Granted)
    wait_until(lambda: poll(backend, "@t") == Spent("expired"), "the lease to expire")


def test_repeated_wait_gets_the_same_lease(balancer: LoadBalancer, backend: Backend) -> None:
    granted = poll(backend, "@t")
    assert poll(backend, "@t") == granted


# Many processes


def wait_in_threads(
    url: str, namespace: str, count: int, dies_at: int
) -> Generator[None, None, list[tuple[str, float]]]:
    """Wait for a lease in each of `count` threads. Return tokens and fencing tokens in the order of the grants.

    The process kills itself while it holds its `dies_at`-th lease. If `dies_at` is 0, it never kills itself.
    """
    backend = Backend(url, namespace=namespace)
    balancer = LoadBalancer(backend=backend)
    grants_seen: list[tuple[str, float]] = []
    lock = threading.Lock()

    def take() -> None:
        with balancer.lease("planner", wait=60, ttl=1.0) as lease:
            with lock:
                grants_seen.append((lease.token, lease.fence))
                if len(grants_seen) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.005)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()
    backend.close()
    return grants_seen


def hold(url: str, namespace: str) -> Generator[str, None, None]:
    instance = LoadBalancer(backend=Backend(url, namespace=namespace)).acquire("planner", ttl=0.5)
    assert instance is not None
    yield instance.id


@pytest.mark.thorough
def test_waiters_keep_order_when_some_are_killed(
    server: Server, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, workers: Workers
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    crowd = [
        workers.start(wait_in_threads, server.url, balancer._backend.namespace, 10, dies_at) for dies_at in (0, 0, 3, 0)
    ]
    for worker in crowd:
        worker.said()
    wait_until(lambda: raw.zcard(pool.waitq) == 40, "all to join the queue")
    queue_before = raw.zrange(pool.waitq, 0, -1)

    crowd[1].kill()
    assert balancer.release(first)
    living = [crowd[0], crowd[3]]
    for worker in living:
        worker.answer()
    grants_seen = sorted((fence, token) for worker in living for token, fence in worker.result())

    pids = {str(worker.pid) for worker in living}
    assert [token for _, token in grants_seen] == [token for token in queue_before if token.split(":")[1] in pids]
    assert len(grants_seen) == 20
    wait_until(lambda: gone(crowd[2].pid), "the third worker to die at its third lease")

    def dead_are_gone() -> bool:  # no waiter, lease or grant is left
        (status,) = balancer.status("planner")
        return status.waiting == status.current_load == 0

    wait_until(dead_are_gone, "the state of dead workers to be removed")
    nothing_left(raw, pool)


def test_capacity_of_killed_process_goes_to_waiters(
    server: Server, balancer: LoadBalancer, kept: list[Any], workers: Workers
) -> None:
    worker = workers.start(hold, server.url, balancer._backend.namespace)
    worker.said()
    worker.kill()
    kept.append(balancer.acquire("planner", wait=20))
    assert kept[0] is not None
    assert isinstance(kept[0].lease, Lease)


# Inspection and repair


def test_leases_and_waiters_show_their_processes(
    call: Call, balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    held = balancer.acquire("planner", ttl=10)
    assert held is not None
    assert held.lease is not None
    poll(backend, "@elsewhere:7:ab:1")
    seen = call(balancer, "leases", "planner")
    (lease,) = seen.leases
    (waiter,) = seen.waiters
    assert (lease.token, lease.instance_id, lease.process) == (held.lease.token, "p0", backend.process)
    assert (lease.fence, lease.fetched) == (held.lease.fence, True)
    assert 0 <= lease.held_for < 5
    assert 0 < lease.expires_in <= 10
    assert (waiter.token, waiter.process) == ("@elsewhere:7:ab:1", "elsewhere:7:ab")
    assert 0 <= waiter.waited < 5
    assert call(balancer, "leases", "nothing").leases == ()

    assert call(balancer, "release_token", "planner", waiter.token) is False
    assert call(balancer, "release_token", "planner", lease.token) is True
    assert call(balancer, "release_token", "planner", lease.token) is False
    assert call(balancer, "release", held) is False
    nothing_left(raw, pool)


def test_drained_instance_becomes_idle_after_release(call: Call, balancer: LoadBalancer, kept: list[Any]) -> None:
    held = balancer.acquire("planner")
    assert held is not None
    kept.append(held)
    assert balancer.drain("planner", "p0")
    assert call(balancer, "wait_until_idle", "planner", "p0", wait=0.05) is False
    thread, _ = in_background(lambda: balancer.release(held))
    assert call(balancer, "wait_until_idle", "planner", "p0", wait=20) is True
    thread.join()
    assert call(balancer, "wait_until_idle", "planner", "unknown") is True


def test_repair_corrects_manual_changes(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, kept: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentperf_redis.balancer.flows.instances.REPAIR_PAGE", 2)
    for number in range(5):
        labels = frozenset({"gpu"} if number == 4 else ())
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=3, labels=labels))
    kept += [balancer.acquire("planner") for _ in range(7)]
    sound = {name: record for name, record in raw.hgetall(pool.state).items() if name[0] != "@"}
    ready = raw.zrange(pool.ready, 0, -1, withscores=True)
    records.change(raw, pool.state, "p1", load=9)
    records.change(raw, pool.state, "p2", load=0)
    lost = {"@orphan": "lease instance=p3 fence=5", "@silent": "waiting ticket=4 ttl_ms=1000 labels=- tokens=0"}
    raw.hset(pool.state, mapping={"#load": 77, "#cap": 3, **lost})
    raw.zadd(pool.waitq, {"@silent": 4, "@unknown": 5})
    raw.zadd(pool.ready_with("gpu"), {"p0": 0})
    raw.zrem(pool.ready, "p4")
    raw.zadd(pool.ready, {"ghost": 1})
    steps: list[tuple[int, int]] = []

    found = call(balancer, "repair", "planner", progress=lambda done, total: steps.append((done, total)))

    assert (found.instances, found.wrong, found.orphans) == (5, 2, 2)
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert {name: record for name, record in raw.hgetall(pool.state).items() if name[0] != "@"} == sound
    assert raw.zrange(pool.ready, 0, -1, withscores=True) == ready
    assert raw.zrange(pool.ready_with("gpu"), 0, -1) == ["p4"]
    assert raw.zrange(pool.waitq, 0, -1) == []
    assert not raw.hexists(pool.state, "@silent")
    again = call(balancer, "repair", "planner")
    assert (again.wrong, again.orphans) == (0, 0)
    assert call(balancer, "repair", "nothing").instances == 0
    for instance in kept:
        assert balancer.release(instance)
