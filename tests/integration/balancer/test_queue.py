"""Standing in line: first come first served, nobody lost, nothing left behind."""

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
    """Holds leases until after the backends were closed; a lease that is dropped goes back with a warning."""
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


def test_who_waits_gets_what_is_given_back(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    assert first.lease is not None
    kept.append(first)
    released_at: list[float] = []

    def release() -> None:
        wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to stand in line")
        released_at.append(time.monotonic())
        assert balancer.release(first)

    with StallDetector() as stalls:
        thread, _ = in_background(release)
        second = call(balancer, "acquire", "planner", wait=20)
        thread.join()
        # by the message: asking by itself takes up to a second
        assert stalls.own(released_at[0], time.monotonic()) < 0.8
    assert second.lease.fence > first.lease.fence
    assert call(balancer, "release", second)
    assert raw.hget(pool.state, second.lease.token) == "tombstone why=released"
    nothing_left(raw, pool)


def test_who_waits_too_long_leaves_the_line(
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


def test_waiting_for_a_pool_that_is_not_there_yet(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    balancer = LoadBalancer(backend=backend)

    def register() -> None:
        wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to stand in line")
        balancer.register_instance(AgentInstance("p0", "planner"))

    thread, _ = in_background(register)
    kept.append(call(balancer, "acquire", "planner", wait=math.inf))
    thread.join()
    assert kept[0].id == "p0"


def test_a_plain_acquire_does_not_overtake(balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    thread, results = in_background(lambda: balancer.acquire("planner", wait=20))
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to stand in line")
    assert balancer.release(first)
    assert balancer.acquire("planner") is None
    thread.join()
    assert balancer.release(results[0])
    nothing_left(raw, pool)


@pytest.fixture
def wait_in_order(
    call: Call, runner: asyncio.Runner, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> Callable[[list[int]], list[int]]:
    """Has callers come one after the other, each with its priority; returns in which order they were served."""
    served: list[int] = []

    def by_threads(priorities: list[int]) -> list[int]:
        def take(number: int, priority: int) -> None:
            with balancer.lease("planner", wait=30, priority=priority):
                served.append(number)

        first = balancer.acquire("planner")
        threads = []
        for number, priority in enumerate(priorities):
            threads.append(threading.Thread(target=take, args=(number, priority)))
            threads[-1].start()
            wait_until(lambda: raw.zcard(pool.waitq) == len(threads), "the next waiter to stand in line")
        assert balancer.release(first)
        for thread in threads:
            thread.join()
        return served

    async def by_tasks(priorities: list[int]) -> list[int]:
        async def take(number: int, priority: int) -> None:
            async with balancer.aio.lease("planner", wait=30, priority=priority):
                served.append(number)

        first = await balancer.aio.acquire("planner")
        tasks = []
        async with asyncio.timeout(30):
            for number, priority in enumerate(priorities):
                tasks.append(asyncio.create_task(take(number, priority)))
                while raw.zcard(pool.waitq) != len(tasks):
                    await asyncio.sleep(0.002)
            assert await balancer.aio.release(first)
            await asyncio.gather(*tasks)
        return served

    return (lambda priorities: runner.run(by_tasks(priorities))) if call.is_async else by_threads


def test_first_come_first_served(
    wait_in_order: Callable[[list[int]], list[int]], raw: Raw, pool: keys.PoolKeys
) -> None:
    assert wait_in_order([0] * 12) == list(range(12))
    nothing_left(raw, pool)


def test_priority_counts_as_having_come_earlier(
    wait_in_order: Callable[[list[int]], list[int]], raw: Raw, pool: keys.PoolKeys
) -> None:
    assert wait_in_order([0, 0, 100, 200, -100, 100]) == [3, 2, 5, 0, 1, 4]
    nothing_left(raw, pool)


def test_a_label_that_is_rare_does_not_hold_up_those_behind(
    backend: Backend, raw: Raw, pool: keys.PoolKeys, kept: list[Any]
) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner", max_capacity=1))
    balancer.register_instance(AgentInstance("gpu", "planner", max_capacity=1, labels=frozenset({"gpu"})))
    held = {
        instance.id: instance for instance in (balancer.acquire("planner"), balancer.acquire("planner")) if instance
    }
    rare, rare_results = in_background(lambda: balancer.acquire("planner", wait=30, require={"gpu"}))
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the first to stand in line")
    plain, plain_results = in_background(lambda: balancer.acquire("planner", wait=30))
    wait_until(lambda: raw.zcard(pool.waitq) == 2, "the second to stand in line")
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
    wait_until(lambda: raw.zcard(pool.waitq) == 1, "the waiter to stand in line")
    other._operations.queues._channels[pool.waitq].close()
    assert balancer.release(first)
    thread.join(10)
    assert other.release(results[0])
    nothing_left(raw, pool)


def test_a_cancelled_wait_leaves_nothing_wherever_it_was(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    async def once(pause: float) -> None:
        holder = await balancer.aio.acquire("planner")
        assert holder is not None
        waiter = asyncio.ensure_future(balancer.aio.acquire("planner", wait=30))
        await asyncio.sleep(0.02)
        release = asyncio.ensure_future(balancer.aio.release(holder))
        await asyncio.sleep(pause)  # the grant races with the cancellation
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


# The script itself: what happens to waiters that do not come back


def ask(
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


def test_priority_starves_nobody(balancer: LoadBalancer, backend: Backend, kept: list[Any]) -> None:
    kept.append(balancer.acquire("planner"))
    assert isinstance(ask(backend, "@first"), Queued)
    came = time.monotonic()
    assert ask(backend, "@urgent", boost_ms=60_000).ahead == 0
    wait_until(lambda: time.monotonic() - came > 1.05, "a priority's worth of time to pass")
    assert ask(backend, "@late and urgent", boost_ms=1000).ahead == 2
    assert ask(backend, "@first").ahead == 1


@pytest.mark.parametrize("ahead", [5, 40, 100])
def test_many_who_need_what_is_rare_neither_hold_up_those_behind_nor_are_these_overtaken(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys, ahead: int
) -> None:
    held = balancer.acquire("planner")
    for number in range(ahead):
        assert isinstance(ask(backend, f"@rare{number}", require="fr" if number % 7 else "gpu"), Queued)
    assert ask(backend, "@first").ahead == ahead
    assert ask(backend, "@second").ahead == ahead + 1
    assert balancer.release(held)
    assert balancer.acquire("planner") is None
    assert isinstance(ask(backend, "@first"), Granted)
    assert backend.run(commands.release(Pool.of(backend.namespace, "planner"), "@first"))
    assert balancer.acquire("planner") is None
    assert isinstance(ask(backend, "@second"), Granted)

    balancer.register_instance(AgentInstance("french", "planner", max_capacity=ahead, labels=frozenset({"fr"})))
    french = [f"@rare{number}" for number in range(ahead) if number % 7]
    for _ in range(0, len(french), 16):  # so many are handed something by one script
        assert isinstance(ask(backend, "@rare0", require="gpu"), Queued)
    grants = {token: records.fields(raw.hget(pool.state, token)) for token in french}
    assert {grant["instance"] for grant in grants.values()} == {"french"}
    assert sorted(french, key=lambda token: int(grants[token]["fence"])) == french


def test_a_waiter_that_fell_silent_is_passed_over(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    assert isinstance(ask(backend, "@dead", live_ms=50), Queued)
    assert isinstance(ask(backend, "@living"), Queued)
    wait_until(lambda: ask(backend, "@living").ahead == 0, "the dead one to lose its place")
    assert balancer.release(first)
    assert isinstance(ask(backend, "@living"), Granted)
    assert not raw.hexists(pool.state, "@dead")


@pytest.mark.parametrize("dead", [3, 20, 60])
def test_what_comes_back_when_all_in_line_are_dead_goes_to_who_asks_next(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys, dead: int
) -> None:
    """However many there are: that they fell silent is cleared away a few at a time."""
    first = balancer.acquire("planner")
    assert first is not None
    assert first.lease is not None
    for number in range(dead):
        assert isinstance(ask(backend, f"@dead{number}"), Queued)
    silence = {f"W@dead{number}": 2 + number for number in range(dead)}
    raw.zadd(pool.due, {first.lease.token: 1, **silence}, xx=True)  # the lease ends first, and is dealt with first
    raw.hset(pool.state, "#next", 0)

    assert isinstance(
        backend.run(commands.acquire(Pool.of(backend.namespace, "planner"), "@next", 10_000, ANY)), Granted
    )

    assert [record for record in raw.hvals(pool.state) if record[:2] == "G "] == []
    assert not balancer.release(first)


@pytest.mark.parametrize("tombstones", [1, 31, 200])
def test_tombstones_that_go_do_not_wake_the_line(
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
        """Of so many that are due soon, the next is not looked for. To be asked for afterwards."""
        return 0.8 if tombstones < 32 else (due_ms[31] - now_ms()) / 1000 - 0.002

    retry_after = ask(backend, "@first").retry_after
    assert min(0.8, minimum()) < retry_after <= 1.0
    with pytest.raises(NoCapacity) as caught, balancer.lease("planner"):
        raise AssertionError
    assert caught.value.retry_after > min(0.8, minimum())


def test_a_grant_that_is_not_fetched_goes_to_the_next_and_a_late_claimer_has_its_old_place(
    balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    slow = ask(backend, "@slow")
    ask(backend, "@second")
    third = ask(backend, "@third")
    assert balancer.release(first)
    assert raw.hget(pool.state, "@slow").startswith("grant instance=p0 ")
    raw.zadd(pool.due, {"@slow": 1})  # as if the three seconds to fetch it had passed
    raw.hset(pool.state, "#next", 1)
    assert isinstance(ask(backend, "@second"), Granted)
    assert raw.hget(pool.state, "@slow") == "tombstone why=unfetched"
    again = ask(backend, "@slow", position=slow.position)
    assert isinstance(again, Queued)
    assert (again.ahead, ask(backend, "@third", position=third.position).ahead) == (0, 1)


def test_a_fetched_lease_that_expired_is_spent(balancer: LoadBalancer, backend: Backend, raw: Raw) -> None:
    assert isinstance(ask(backend, "@t", ttl_ms=30), Granted)
    wait_until(lambda: ask(backend, "@t") == Spent("expired"), "the lease to expire")


def test_a_repeated_question_gets_the_same_lease(balancer: LoadBalancer, backend: Backend) -> None:
    granted = ask(backend, "@t")
    assert ask(backend, "@t") == granted


# Many processes


def stand(url: str, namespace: str, count: int, dies_at: int) -> Generator[None, None, list[tuple[str, float]]]:
    """Stand in line `count` times at once; return who was served when (its fence), or die holding lease `dies_at`."""
    backend = Backend(url, namespace=namespace)
    balancer = LoadBalancer(backend=backend)
    served: list[tuple[str, float]] = []
    lock = threading.Lock()

    def take() -> None:
        with balancer.lease("planner", wait=60, ttl=1.0) as lease:
            with lock:
                served.append((lease.token, lease.fence))
                if len(served) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.005)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()
    backend.close()
    return served


def hold(url: str, namespace: str) -> Generator[str, None, None]:
    instance = LoadBalancer(backend=Backend(url, namespace=namespace)).acquire("planner", ttl=0.5)
    assert instance is not None
    yield instance.id


@pytest.mark.thorough
def test_waiters_of_many_processes_are_served_in_order_though_some_are_killed(
    server: Server, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, workers: Workers
) -> None:
    first = balancer.acquire("planner")
    assert first is not None
    crowd = [workers.start(stand, server.url, balancer._backend.namespace, 10, dies_at) for dies_at in (0, 0, 3, 0)]
    for worker in crowd:
        worker.said()
    wait_until(lambda: raw.zcard(pool.waitq) == 40, "all to stand in line")
    line = raw.zrange(pool.waitq, 0, -1)

    crowd[1].kill()
    assert balancer.release(first)
    living = [crowd[0], crowd[3]]
    for worker in living:
        worker.answer()
    served = sorted((fence, token) for worker in living for token, fence in worker.result())

    pids = {str(worker.pid) for worker in living}
    assert [token for _, token in served] == [token for token in line if token.split(":")[1] in pids]
    assert len(served) == 20
    wait_until(lambda: gone(crowd[2].pid), "the third to die of its third lease, however far behind it stood")

    def dead_are_gone() -> bool:  # out of line, and without what they held or were handed
        (status,) = balancer.status("planner")
        return status.waiting == status.current_load == 0

    wait_until(dead_are_gone, "the dead to be gone")
    nothing_left(raw, pool)


def test_the_capacity_of_a_killed_process_goes_to_the_line(
    server: Server, balancer: LoadBalancer, kept: list[Any], workers: Workers
) -> None:
    worker = workers.start(hold, server.url, balancer._backend.namespace)
    worker.said()
    worker.kill()
    kept.append(balancer.acquire("planner", wait=20))
    assert kept[0] is not None
    assert isinstance(kept[0].lease, Lease)


# Who holds what


def test_leases_and_waiters_can_be_seen_with_their_processes(
    call: Call, balancer: LoadBalancer, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    held = balancer.acquire("planner", ttl=10)
    assert held is not None
    assert held.lease is not None
    ask(backend, "@elsewhere:7:ab:1")
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


def test_drain_and_wait_until_idle(call: Call, balancer: LoadBalancer, kept: list[Any]) -> None:
    held = balancer.acquire("planner")
    assert held is not None
    kept.append(held)
    assert balancer.drain("planner", "p0")
    assert call(balancer, "wait_until_idle", "planner", "p0", wait=0.05) is False
    thread, _ = in_background(lambda: balancer.release(held))
    assert call(balancer, "wait_until_idle", "planner", "p0", wait=20) is True
    thread.join()
    assert call(balancer, "wait_until_idle", "planner", "nobody") is True


def test_repair_puts_right_what_was_changed_by_hand(
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
    raw.zadd(pool.waitq, {"@silent": 4, "@nobody": 5})
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
