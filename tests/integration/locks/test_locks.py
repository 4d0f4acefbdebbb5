"""`perf.lock` and `perf.semaphore` are fair, fenced and renewed, become free if a holder dies, and leave no keys."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf, InvalidArgument, Lock, LockError, LockNotOwned, Semaphore, keys
from agentperf_redis.backend import Backend
from agentperf_redis.locks import commands, flows
from agentperf_redis.locks.commands import Place
from agentperf_redis.locks.keeper import lock_keeper_of
from tests.support.calls import Call
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.workers import Workers

MAX_BYTES = 700
MINUTE_MS = 60_000


@pytest.fixture
def where(namespace: str) -> keys.LockKeys:
    return keys.lock(namespace, "lock", "x")


def left(raw: Raw, namespace: str) -> dict[str, int]:
    """Return the keys of all locks and semaphores of the namespace, with their TTLs in ms."""
    found = [key for kind in ("lock", "semaphore") for key in raw.scan_iter(f"{namespace}:{{{kind}:*", count=1000)]
    return {key: raw.pttl(key) for key in found}


@contextlib.contextmanager
def entered(call: Call, runner: asyncio.Runner, lock: Any) -> Iterator[Any]:
    """Hold a lock for a block, through either API."""
    if not call.is_async:
        with lock as held:
            yield held
        return
    held = runner.run(lock.aio.__aenter__())
    try:
        yield held
    except BaseException as error:
        runner.run(lock.aio.__aexit__(type(error), error, error.__traceback__))
        raise
    runner.run(lock.aio.__aexit__(None, None, None))


def test_only_one_holds_a_lock(perf: AgentPerf, call: Call, runner: asyncio.Runner, raw: Raw, namespace: str) -> None:
    mine, other = perf.lock("x"), perf.lock("x")
    assert call(mine, "locked") is False
    with entered(call, runner, mine) as held:
        assert call(mine, "owned") is call(other, "locked") is True
        assert call(other, "owned") is False
        assert call(other, "acquire", blocking=False) is False
        assert call(other, "acquire", blocking_timeout=0.02) is False
        assert 25 < held.remaining <= 30
        fence = held.fence
        assert (held.name, other.fence, other.remaining) == ("x", None, 0.0)
        with (
            pytest.raises(LockError, match="'x': it was not free in time"),
            entered(call, runner, perf.lock("x", blocking=False)),
        ):
            pass
    assert call(mine, "locked") is call(mine, "owned") is False
    assert mine.fence is None
    assert call(other, "acquire") is True
    assert other.fence is not None
    assert other.fence > fence
    call(other, "release")
    assert left(raw, namespace) == {}


def test_semaphore_admits_its_limit(perf: AgentPerf, call: Call, raw: Raw, namespace: str) -> None:
    semaphore = perf.semaphore("x", 3)
    assert [call(semaphore, "acquire", blocking=False) for _ in range(4)] == [True, True, True, False]
    assert call(semaphore, "locked") is True
    wider = perf.semaphore("x", 4)
    assert call(wider, "acquire", blocking=False) is True  # each request applies its own limit
    assert call(perf.lock("x"), "locked") is False
    for _ in range(3):
        call(semaphore, "release")
    assert call(semaphore, "locked") is False
    with pytest.raises(LockError, match="not acquired"):
        call(semaphore, "release")
    call(wider, "release")
    assert left(raw, namespace) == {}


def test_higher_limit_passes_no_waiter(perf: AgentPerf, call: Call, raw: Raw, namespace: str) -> None:
    def wait() -> None:
        with perf.semaphore("x", 1):
            pass

    wide = perf.semaphore("x", 4)
    with perf.semaphore("x", 1):
        waiter = threading.Thread(target=wait)
        waiter.start()
        queue = keys.lock(namespace, "semaphore", "x").queue
        wait_until(lambda: raw.zcard(queue), "the waiter is queued")
        assert call(wide, "acquire", blocking=False) is False
    waiter.join(60)
    assert call(wide, "acquire", blocking=False) is True
    call(wide, "release")


def test_tasks_share_a_semaphore(perf: AgentPerf, runner: asyncio.Runner, raw: Raw, namespace: str) -> None:
    semaphore, running, peak = perf.semaphore("x", 3), 0, 0

    async def work() -> None:
        nonlocal running, peak
        async with semaphore.aio:
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0.005)
            running -= 1

    async def all_work() -> None:
        await asyncio.gather(*(work() for _ in range(20)))

    runner.run(all_work())
    assert (running, peak) == (0, 3)
    assert left(raw, namespace) == {}


def test_late_task_does_not_release_the_lock_of_another(
    perf: AgentPerf, runner: asyncio.Runner, raw: Raw, where: keys.LockKeys
) -> None:
    lock = perf.lock("x", timeout=600)

    async def overrun(entered: asyncio.Event, acquired: asyncio.Event) -> None:
        async with lock.aio:
            entered.set()
            await acquired.wait()

    async def both() -> None:
        entered, acquired = asyncio.Event(), asyncio.Event()
        late = asyncio.create_task(overrun(entered, acquired))
        await entered.wait()
        raw.zadd(where.held, {raw.zrange(where.held, 0, 0)[0]: 1})  # as if the lease of `late` had expired
        assert await lock.aio.acquire(blocking_timeout=60)
        fence = lock.fence
        acquired.set()
        with pytest.raises(LockNotOwned):
            await late
        assert (lock.fence, await lock.aio.owned()) == (fence, True)
        await lock.aio.release()

    runner.run(both())


def test_threads_release_their_own_units(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    semaphore, ready, other = perf.semaphore("x", 2), threading.Barrier(2, timeout=60), list[int | None]()

    def hold() -> None:
        with semaphore:
            ready.wait()  # only now may the main thread acquire its unit
            ready.wait()  # both threads now hold a unit
            other.append(semaphore.fence)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    with semaphore:
        newer = semaphore.fence
        ready.wait()
        thread.join(60)
        assert semaphore.fence == newer
        assert semaphore.owned()
    assert other != [newer]
    assert left(raw, namespace) == {}


def test_leases_left_to_their_timeout_are_forgotten(perf: AgentPerf, call: Call) -> None:
    lock = perf.lock("x", timeout=0.05, thread_local=False)
    for _ in range(3):
        assert call(lock, "acquire", blocking_timeout=60)
        time.sleep(0.06)
    assert len(lock._locking.holder.units) == len(lock_keeper_of(perf.backend)._held) == 1


def test_waiters_are_served_in_order(perf: AgentPerf, raw: Raw, where: keys.LockKeys, namespace: str) -> None:
    order: list[int] = []

    def work(number: int) -> None:
        with perf.lock("x"):
            order.append(number)

    with perf.lock("x"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda number=number: raw.zcard(where.queue) == number + 1, "the waiter is queued")  # type: ignore[misc]
        assert perf.lock("x").acquire(blocking=False) is False
    for thread in threads:
        thread.join(60)
    assert order == list(range(5))
    assert left(raw, namespace) == {}


def test_released_lock_wakes_its_waiter(
    perf: AgentPerf, raw: Raw, where: keys.LockKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "_MIN_WAIT_S", 600.0)  # the waiter polls only every 600 s, too late for this test
    monkeypatch.setattr(flows, "LIVE_MS", 600_000)
    woken = threading.Event()

    def wait() -> None:
        with perf.lock("x"):
            woken.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with perf.lock("x"):
        waiter.start()
        wait_until(lambda: raw.zcard(where.queue), "the waiter is queued")
        time.sleep(0.1)  # let the waiter subscribe to its wake-up
    assert woken.wait(60)
    waiter.join(60)


def test_held_lock_is_renewed(perf: AgentPerf, call: Call, runner: asyncio.Runner) -> None:
    with entered(call, runner, perf.lock("x", ttl=1.0)) as lock:
        for _ in range(2):
            held = lock._locking.newest
            until = held.valid_until
            wait_until(lambda held=held, until=until: held.valid_until > until, "the lock is renewed")  # type: ignore[misc]
        assert lock.remaining <= 1.0
        assert call(perf.lock("x"), "locked")


def test_lock_with_a_timeout_ends_by_itself(perf: AgentPerf, call: Call) -> None:
    lock, other = perf.lock("x", timeout=0.1), perf.lock("x")
    assert call(lock, "acquire")
    assert call(other, "acquire", blocking_timeout=60)
    assert call(lock, "owned") is False
    with pytest.raises(LockNotOwned, match="expired"):
        call(lock, "release")
    call(other, "release")


def test_extension_adds_time_or_replaces_it(perf: AgentPerf, call: Call, raw: Raw, where: keys.LockKeys) -> None:
    lock = perf.lock("x", timeout=100)
    call(lock, "acquire")
    assert call(lock, "extend", 50)
    assert 140 < lock.remaining <= 150
    assert call(lock, "extend", 200, replace_ttl=True)
    assert 190 < lock.remaining <= 200
    assert call(lock, "reacquire")
    assert 90 < lock.remaining <= 100
    raw.delete(where.held, where.state)
    with pytest.raises(LockNotOwned):
        call(lock, "extend", 50)
    with pytest.raises(LockNotOwned):
        call(lock, "release")
    renewed = perf.lock("x")
    call(renewed, "acquire")
    for method, args in (("extend", (5,)), ("reacquire", ())):
        with pytest.raises(LockError, match="no timeout"):
            call(renewed, method, *args)
    call(renewed, "release")


def test_lost_lock_is_reported_at_the_end_of_its_block(
    perf: AgentPerf, call: Call, runner: asyncio.Runner, raw: Raw, where: keys.LockKeys
) -> None:
    with pytest.raises(LockNotOwned, match="'x': it expired"), entered(call, runner, perf.lock("x")):
        raw.delete(where.held, where.state)
    with entered(call, runner, perf.lock("x", raise_on_release_error=False)):
        raw.delete(where.held, where.state)
    with contextlib.suppress(ZeroDivisionError), entered(call, runner, perf.lock("x")):
        raw.delete(where.held, where.state)
        raise ZeroDivisionError


def test_renewal_notices_a_lost_lock(perf: AgentPerf, raw: Raw, where: keys.LockKeys) -> None:
    lock = perf.lock("x", ttl=0.3)
    lock.acquire()
    raw.delete(where.held, where.state)
    wait_until(lambda: lock.remaining == 0, "the renewal fails")
    with pytest.raises(LockNotOwned):
        lock.release()


def hold(url: str, namespace: str) -> Iterator[Any]:
    with AgentPerf(url, namespace=namespace) as perf:
        lock = perf.lock("x", ttl=1.0)
        lock.acquire()
        yield lock.fence


@pytest.mark.thorough
def test_lock_of_a_killed_process_becomes_free(
    server: Server, perf: AgentPerf, call: Call, workers: Workers, namespace: str, raw: Raw, where: keys.LockKeys
) -> None:
    worker = workers.start(hold, server.url, namespace)
    fence = worker.said()
    assert call(perf.lock("x"), "acquire", blocking=False) is False
    worker.kill()
    assert 0 < raw.pttl(where.state) <= 1000
    lock = perf.lock("x")
    assert call(lock, "acquire", blocking_timeout=60)
    assert lock.fence is not None
    assert lock.fence > fence
    call(lock, "release")


def test_dead_waiter_is_skipped(perf: AgentPerf, backend: Backend, call: Call, namespace: str, raw: Raw) -> None:
    place = Place.of(namespace, "lock", "x")
    with perf.lock("x"):
        backend.run(commands.acquire(place, "@dead", ttl=30, limit=1, live_ms=1))
        assert raw.zcard(place.keys.queue) == 1
        time.sleep(0.01)
    lock = perf.lock("x")
    assert call(lock, "acquire", blocking_timeout=60)
    call(lock, "release")
    assert left(raw, namespace) == {}


def test_cancelled_waiter_leaves_the_queue(
    perf: AgentPerf, runner: asyncio.Runner, raw: Raw, where: keys.LockKeys, namespace: str
) -> None:
    async def wait_and_cancel() -> None:
        waiting = asyncio.create_task(perf.lock("x").aio.acquire())
        await asyncio.to_thread(wait_until, lambda: raw.zcard(where.queue), "the waiter is queued")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with perf.lock("x"):
        runner.run(wait_and_cancel())
        wait_until(lambda: not raw.zcard(where.queue), "the waiter leaves")
    assert all(":spent:" in key and 0 < ttl <= MINUTE_MS for key, ttl in left(raw, namespace).items())


@pytest.mark.parametrize("fault", ["reset_after_reply", "reset_before_request"])
def test_lost_replies_change_nothing_twice(
    connect: Callable[..., Backend],
    call: Call,
    proxy: Proxy,
    raw: Raw,
    where: keys.LockKeys,
    namespace: str,
    fault: str,
) -> None:
    lock = Lock("x", backend=connect(proxy.url))
    call(lock, "acquire")
    call(lock, "release")
    met = getattr(proxy, fault)(only=commands.ACQUIRE)
    assert call(lock, "acquire")
    assert met.caught.is_set()
    assert raw.zcard(where.held) == 1
    met = getattr(proxy, fault)(only=commands.RELEASE)
    call(lock, "release")
    assert met.caught.is_set()
    assert all(":spent:" in key and 0 < ttl <= MINUTE_MS for key, ttl in left(raw, namespace).items())


def test_lost_reply_adds_time_once(connect: Callable[..., Backend], call: Call, proxy: Proxy) -> None:
    lock = Lock("x", timeout=1000, backend=connect(proxy.url))
    call(lock, "acquire")
    for seconds in (1000, 2000):
        met = proxy.reset_after_reply(only=commands.EXTEND)
        call(lock, "extend", 1000)
        assert met.caught.is_set()
        assert seconds - 60 < lock.remaining - 1000 <= seconds
    call(lock, "release")


def test_late_copy_of_a_request_is_refused(
    connect: Callable[..., Backend], call: Call, proxy: Proxy, raw: Raw, where: keys.LockKeys
) -> None:
    lock = Lock("x", backend=connect(proxy.url))
    call(lock, "acquire")
    call(lock, "release")
    held = proxy.hold(only=commands.ACQUIRE)
    assert call(lock, "acquire")  # the retry is granted while the first copy is still delayed
    call(lock, "release")
    assert held.deliver() == b"*2\r\n:-1\r\n$8\r\nreleased\r\n"
    assert raw.zcard(where.held) == 0


def test_late_copy_of_a_refused_request_takes_nothing(
    perf: AgentPerf, connect: Callable[..., Backend], call: Call, proxy: Proxy, raw: Raw, where: keys.LockKeys
) -> None:
    lock, other = Lock("x", backend=connect(proxy.url)), perf.lock("x")
    call(lock, "acquire")
    call(lock, "release")
    other.acquire()
    held = proxy.hold(only=commands.ACQUIRE)
    assert call(lock, "acquire", blocking=False) is False  # the retry is refused while the first copy is still delayed
    other.release()
    assert held.deliver() == b"*2\r\n:-1\r\n$7\r\nrefused\r\n"
    assert raw.zcard(where.held) == 0


def test_refused_request_that_was_sent_twice_can_wait(
    perf: AgentPerf, connect: Callable[..., Backend], call: Call, proxy: Proxy, raw: Raw, where: keys.LockKeys
) -> None:
    lock, other = Lock("x", backend=connect(proxy.url)), perf.lock("x", thread_local=False)
    call(lock, "acquire")
    call(lock, "release")
    other.acquire()

    def release() -> None:
        wait_until(lambda: raw.zcard(where.queue), "the waiter is queued")
        other.release()

    releaser = threading.Thread(target=release)
    releaser.start()
    met = proxy.reset_after_reply(only=commands.ACQUIRE)
    assert call(lock, "acquire", blocking_timeout=60)
    assert met.caught.is_set()
    releaser.join(60)
    call(lock, "release")


def test_lock_is_small(backend: Backend, raw: Raw, namespace: str) -> None:
    backend.process = f"{'a-rather-long-deployment-name-' * 3}6d4cf56db6-x7k2p:12345:0123abcd"
    lock = Lock("a-lock-with-a-name-of-40-characters-or-so", backend=backend)
    lock.acquire()
    assert sum(raw.memory_usage(key) for key in left(raw, namespace)) <= MAX_BYTES
    assert all(0 < ttl <= 30_000 for ttl in left(raw, namespace).values())
    lock.release()
    assert left(raw, namespace) == {}


def test_dropped_lock_is_released(perf: AgentPerf, raw: Raw, where: keys.LockKeys) -> None:
    perf.lock("x").acquire()
    gc.collect()
    wait_until(lambda: not raw.exists(where.state), "the lock is released")


def test_dropped_unit_with_a_timeout_is_held_until_then(perf: AgentPerf) -> None:
    def acquire() -> None:
        assert perf.lock("x", timeout=60).acquire(blocking=False)
        assert perf.semaphore("x", 1, timeout=60).acquire(blocking=False)

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join(60)
    gc.collect()
    dropped = threading.Event()
    lock_keeper_of(perf.backend).leases.jobs.put(dropped.set)  # `dropped` is set after all earlier releases
    assert dropped.wait(60)
    assert not perf.lock("x", timeout=60).acquire(blocking=False)
    assert not perf.semaphore("x", 1, timeout=60).acquire(blocking=False)


def test_close_releases_locks(server: Server, namespace: str, raw: Raw, where: keys.LockKeys) -> None:
    perf = AgentPerf(server.url, namespace=namespace)
    lock = perf.lock("x")
    lock.acquire()
    perf.close()
    assert not raw.exists(where.state)
    with pytest.raises(LockNotOwned, match="closed"):
        lock.release()


def test_forked_child_holds_nothing(perf: AgentPerf) -> None:
    lock = perf.lock("x")
    lock.acquire()
    held = lock._locking.newest
    keeper = lock_keeper_of(perf.backend)
    assert held is not None
    assert keeper.holds(held)
    before = keeper._held
    keeper.after_fork()
    assert not keeper.holds(held)
    assert lock.remaining == 0
    keeper._held = before
    lock.release()


@pytest.mark.parametrize("thread_local", [True, False])
def test_other_thread_may_release_if_the_lock_is_not_thread_local(perf: AgentPerf, thread_local: bool) -> None:
    lock, errors = perf.lock("x", thread_local=thread_local), list[Exception]()
    lock.acquire()

    def release() -> None:
        try:
            lock.release()
        except LockError as error:
            errors.append(error)

    thread = threading.Thread(target=release)
    thread.start()
    thread.join(60)
    assert bool(errors) is thread_local
    if thread_local:
        lock.release()


def test_release_within_the_block_is_an_error(perf: AgentPerf, call: Call, runner: asyncio.Runner) -> None:
    lock = perf.lock("x")
    with pytest.raises(LockError, match="within its `with` block"), entered(call, runner, lock):
        call(lock, "release")


def test_wrong_context_manager_names_the_right_one(perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def enter() -> None:
        async with perf.lock("x"):
            pass

    with pytest.raises(TypeError, match=r"async with lock\.aio"):
        runner.run(enter())
    with pytest.raises(TypeError, match="async with"), perf.lock("x").aio:
        pass


ANY_LOCK: Any = Lock
ANY_SEMAPHORE: Any = Semaphore
"""The classes without their types, because the next test passes arguments of wrong types."""


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("name", lambda backend: ANY_LOCK("", backend=backend)),
        ("name", lambda backend: ANY_LOCK(None, backend=backend)),
        ("timeout", lambda backend: ANY_LOCK("x", timeout=0, backend=backend)),
        ("ttl", lambda backend: ANY_LOCK("x", ttl=86_401, backend=backend)),
        ("blocking", lambda backend: ANY_LOCK("x", blocking=1, backend=backend)),
        ("blocking_timeout", lambda backend: ANY_LOCK("x", blocking_timeout=-1, backend=backend)),
        ("thread_local", lambda backend: ANY_LOCK("x", thread_local=None, backend=backend)),
        ("raise_on_release_error", lambda backend: ANY_LOCK("x", raise_on_release_error="no", backend=backend)),
        ("limit", lambda backend: ANY_SEMAPHORE("x", 0, backend=backend)),
        ("limit", lambda backend: ANY_SEMAPHORE("x", 1.5, backend=backend)),
        ("blocking", lambda backend: ANY_LOCK("x", backend=backend).acquire(blocking="yes")),
        ("blocking_timeout", lambda backend: ANY_LOCK("x", backend=backend).acquire(blocking_timeout="1")),
        ("additional_time", lambda backend: ANY_LOCK("x", timeout=5, backend=backend).extend(0)),
        ("replace_ttl", lambda backend: ANY_LOCK("x", timeout=5, backend=backend).extend(5, replace_ttl=1)),
        ("backend", lambda backend: ANY_LOCK("x", backend="redis://")),
    ],
)
def test_invalid_argument_is_named(backend: Backend, argument: str, make: Callable[[Backend], object]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        make(backend)
    assert refused.value.argument == argument


def use(url: str, namespace: str, first: int, count: int) -> None:
    with AgentPerf(url, namespace=namespace) as perf:
        for number in range(first, first + count):
            with perf.lock(f"job {number}"):
                pass


@pytest.mark.thorough
def test_ten_thousand_names_leave_no_key(server: Server, raw: Raw, workers: Workers, namespace: str) -> None:
    """Each key that is left at the end expires within a minute. So a minute later, no key is left."""
    workers.run(use, [(server.url, namespace, number * 2500, 2500) for number in range(4)])
    found = left(raw, namespace)
    assert len(found) < 100  # usually none: a tombstone stays only if a request was sent twice
    assert all(0 < ttl <= MINUTE_MS for ttl in found.values())
    assert raw.zcard(keys.resources(namespace)) == 0
