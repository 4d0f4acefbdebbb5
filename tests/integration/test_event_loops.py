"""If an event loop ends while tasks are pending, their leases are released, and other callers continue at once."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest

from agentperf_redis import AgentInstance, LoadBalancer, LRUCache
from agentperf_redis.backend import Backend
from agentperf_redis.cache.process import flights
from tests.support.forks import in_child
from tests.support.places import ROOT
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until

NEVER_S = 3600.0
"""A TTL or lease so long that nothing in a test waits for its end."""

Request: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Any]


def closed(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a loop of its own, as a synchronous web view may do. Other tasks of the loop are dropped."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


@pytest.fixture(params=[closed, asyncio.run], ids=["loop.close", "asyncio.run"])
def request_in_own_loop(request: pytest.FixtureRequest) -> Request:
    made: Request = request.param
    return made


@pytest.fixture(autouse=True)
def _quiet_destroyed_tasks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hide the log messages of asyncio about the pending tasks that a test destroys."""
    yield
    with caplog.at_level(logging.CRITICAL, "asyncio"):
        gc.collect()


async def pending(work: Coroutine[Any, Any, Any], begun: threading.Event) -> None:
    """Start the work as a task, and return when `begun` is set. The task does not end before that."""
    task = asyncio.create_task(work)
    while not begun.is_set():
        await asyncio.sleep(0.001)
        assert not task.done(), task


class Endless:
    """A coroutine function that never returns."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    async def __call__(self) -> str:
        self.begun.set()
        await asyncio.sleep(NEVER_S)
        return "never"


class Stubborn(Endless):
    """A coroutine function whose coroutine waits again when it is closed."""

    async def __call__(self) -> str:
        try:
            return await super().__call__()
        finally:
            await asyncio.sleep(NEVER_S)


@pytest.mark.thorough
def test_refresh_in_loops_of_single_requests_comes_to_its_end(backend: Backend, request_in_own_loop: Request) -> None:
    cache = LRUCache(backend=backend, lease=NEVER_S)
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return calls

    async def ask() -> Any:
        return await cache.aio.get_or_compute("k", load, ttl=600, soft_ttl=0.05)

    seen: list[int] = []

    def newer() -> bool:
        time.sleep(0.06)
        seen.append(request_in_own_loop(ask()))
        return seen[-1] >= 3

    wait_until(newer, "two refreshes")
    assert seen == sorted(seen)


@pytest.mark.thorough
def test_failing_refresh_of_single_requests_serves_the_old_value(
    backend: Backend, request_in_own_loop: Request
) -> None:
    cache = LRUCache(backend=backend, lease=NEVER_S)
    calls = 0

    async def load() -> str:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        if calls > 1:
            raise ValueError(calls)
        return "old"

    async def ask() -> Any:
        return await cache.aio.get_or_compute("k", load, ttl=600, soft_ttl=0.05)

    def failed_often() -> bool:
        time.sleep(0.06)
        assert request_in_own_loop(ask()) == "old"
        return calls > 2

    wait_until(failed_often, "a refresh in the foreground that fails")


# When Python closes the coroutine of `Stubborn`, the coroutine awaits again. Python warns about this second await.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <coroutine object")
@pytest.mark.parametrize("function", [Endless, Stubborn])
def test_computation_of_a_closed_loop_is_given_up_at_once(
    backend: Backend, connect: Callable[..., Backend], server: Server, function: type[Endless]
) -> None:
    cache, remote = (LRUCache(backend=each, lease=NEVER_S) for each in (backend, connect(server.url)))
    never = function()
    closed(pending(cache.aio.get_or_compute("k", never), never.begun))
    assert remote.get_or_compute("k", lambda: "remote") == "remote"
    assert cache.get_or_compute("k", lambda: "local") == "remote"


def test_waiters_of_a_closed_loop_compute(backend: Backend) -> None:
    cache = LRUCache(backend=backend, lease=NEVER_S)
    never, answers = Endless(), []
    ready = threading.Event()

    def wait() -> None:
        ready.set()
        answers.append(cache.get_or_compute("k", lambda: "mine"))

    waiter = threading.Thread(target=wait)

    async def main() -> None:
        await pending(cache.aio.get_or_compute("k", never), never.begun)
        waiter.start()
        await asyncio.to_thread(ready.wait)

    closed(main())
    waiter.join(20)
    assert answers == ["mine"]


def test_refresh_of_a_closed_loop_leaves_no_lease(
    backend: Backend, connect: Callable[..., Backend], server: Server
) -> None:
    cache, remote = (LRUCache(backend=each, lease=NEVER_S) for each in (backend, connect(server.url)))
    cache.get_or_compute("k", lambda: "old", ttl=600, soft_ttl=0.05)
    time.sleep(0.06)
    never = Endless()

    async def ask() -> None:
        assert await cache.aio.get_or_compute("k", never, ttl=600, soft_ttl=0.05) == "old"
        while not never.begun.is_set():
            await asyncio.sleep(0.001)

    closed(ask())
    options: Any = {"ttl": 600, "soft_ttl": NEVER_S / 10}
    wait_until(lambda: remote.get_or_compute("k", lambda: "new", **options) == "new", "another process to refresh")


def test_warm_up_of_a_closed_loop_leaves_no_leases(backend: Backend) -> None:
    cache = LRUCache(backend=backend, lease=NEVER_S)
    begun = threading.Event()
    started = []

    async def never(key: str) -> None:
        started.append(key)
        if len(started) == 3:
            begun.set()
        await asyncio.sleep(NEVER_S)

    keys = ["a", "b", "c"]
    closed(pending(cache.aio.warm_up(keys, never), begun))
    assert cache.warm_up(keys, str.upper).computed == 3


async def hold(lb: LoadBalancer, begun: threading.Event) -> None:
    """Hold a lease until the loop ends."""
    async with lb.aio.lease("coder", ttl=NEVER_S, max_hold=NEVER_S):
        begun.set()
        await asyncio.sleep(NEVER_S)


def test_lease_block_of_a_closed_loop_is_released(backend: Backend, request_in_own_loop: Request) -> None:
    lb = LoadBalancer(backend=backend)
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
    begun = threading.Event()

    request_in_own_loop(pending(hold(lb, begun), begun))
    wait_until(lambda: not lb.leases("coder").leases, "the release of the lease")


def test_abandoned_generators_leave_no_lease_behind(backend: Backend) -> None:
    lb = LoadBalancer(backend=backend)
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=5))

    async def stream() -> AsyncGenerator[int, None]:
        async with lb.aio.lease("coder"):
            yield 1
            yield 2

    async def work() -> int:
        for _ in range(5):
            answers = stream()
            assert await anext(answers) == 1
            await answers.aclose()
        return len(backend._async_executors[asyncio.get_running_loop()]._on_loop_end)

    assert asyncio.run(work()) == 0
    wait_until(lambda: not lb.leases("coder").leases, "the release of the leases")


def test_map_of_loops_may_change_while_it_is_listed(backend: Backend) -> None:
    """Loops of other threads add their executors at any time. Here each garbage collection adds an executor."""

    class Loop:
        def is_closed(self) -> bool:
            return False

    executors: Any = backend._async_executors
    loops: list[Loop] = []

    def add(*_: object) -> None:
        loops.append(Loop())
        executors[loops[-1]] = object()

    for _ in range(20):
        add()
    thresholds = gc.get_threshold()
    gc.callbacks.append(add)
    gc.set_threshold(1)
    try:
        listed = backend._executors_by_loop()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(add)
        executors.clear()
    assert len(listed) >= 20
    assert len(loops) > 20, "the map was changed"


# On a busy machine, the loop may be closed while the waiter opens a connection. In CPython 3.11, closing a transport
# needs a running loop, so `create_connection` leaves its transport open. Later, the garbage collector closes the socket
# and warns.
@pytest.mark.filterwarnings("ignore:(?s).*unclosed (transport|<socket):pytest.PytestUnraisableExceptionWarning")
def test_waiter_of_a_closed_loop_leaves_the_queue(backend: Backend, request_in_own_loop: Request) -> None:
    lb = LoadBalancer(backend=backend)
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
    held = lb.acquire("coder", ttl=NEVER_S)
    queued = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(lb.aio.acquire("coder", wait=NEVER_S))
        while not queued.is_set():
            await asyncio.sleep(0.01)
            if (await lb.aio.leases("coder")).waiters:
                queued.set()
        assert not task.done()

    request_in_own_loop(main())
    wait_until(lambda: not lb.leases("coder").waiters, "the waiter to leave the queue")
    assert lb.release(held)
    assert lb.release(lb.acquire("coder"))


def test_report_that_the_end_of_a_loop_interrupts_is_sent(
    proxy: Proxy, connect: Callable[..., Backend], server: Server
) -> None:
    """A cancelled task releases its compute lease in a shielded task. The loop ends before that request is sent."""
    cache, remote = (LRUCache(backend=connect(url), lease=NEVER_S) for url in (proxy.url, server.url))
    never = Endless()

    async def main() -> None:
        task = asyncio.create_task(cache.aio.get_or_compute("k", never))
        while not never.begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)  # the request that releases the lease is about to be sent

    asyncio.run(main())
    assert remote.get_or_compute("k", lambda: "remote") == "remote"


def test_stopped_loop_does_not_block_its_keys(
    backend: Backend, connect: Callable[..., Backend], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may keep a loop for its next request. Until that request comes, if ever, the loop is stopped."""
    monkeypatch.setattr(flights, "STUCK_S", 0.3)
    cache, remote = (LRUCache(backend=each, lease=0.3) for each in (backend, connect(server.url)))
    never = Endless()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(pending(cache.aio.get_or_compute("k", never), never.begun))
    try:
        with ThreadPoolExecutor(1) as other_thread:  # the loop's own thread would compute at once, without waiting
            assert other_thread.submit(cache.get_or_compute, "k", lambda: "here").result(20) == "here"
        assert remote.get_or_compute("k", lambda: "there") == "here"
    finally:
        loop.close()


def test_stopped_loop_that_runs_again_keeps_its_lease(backend: Backend) -> None:
    cache = LRUCache(backend=backend, lease=NEVER_S)
    begun, may_end = threading.Event(), asyncio.Event()

    async def load() -> str:
        begun.set()
        await may_end.wait()
        return "value"

    async def rest() -> None:
        may_end.set()
        while asyncio.current_task() is None or len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.001)

    with asyncio.Runner() as runner:
        runner.run(pending(cache.aio.get_or_compute("k", load), begun))
        runner.run(rest())
    assert cache.get("k") == "value"


def test_forked_child_gives_back_nothing_of_its_parent(backend: Backend) -> None:
    lb = LoadBalancer(backend=backend)
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
    begun = threading.Event()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(pending(hold(lb, begun), begun))

    def child() -> None:
        loop.close()
        gc.collect()
        time.sleep(0.2)

    in_child(child)
    assert len(lb.leases("coder").leases) == 1
    loop.close()
    wait_until(lambda: not lb.leases("coder").leases, "the release of the lease")


PROGRAM = """
import asyncio, sys, time
from agentperf_redis import AgentPerf

async def load():
    await asyncio.sleep(0.01)
    return 1

async def ask():
    return await cache.aio.get_or_compute("k", load, ttl=600, soft_ttl=0.02)

with AgentPerf() as perf:
    cache = perf.cache("c")
    for _ in range(10):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(ask())
        loop.close()
        time.sleep(0.03)
"""


@pytest.mark.thorough
def test_cut_off_refreshes_print_nothing(server: Server, namespace: str) -> None:
    env = {**os.environ, "AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_connections_close_with_their_loop(backend: Backend, raw: Raw) -> None:
    def connections() -> int:
        return int(raw.info("clients")["connected_clients"])

    async def use() -> None:
        await LRUCache(backend=backend).aio.put("k", 1)

    LRUCache(backend=backend).put("k", 1)
    before = connections()
    for _ in range(20):
        closed(use())
    wait_until(lambda: connections() <= before, "the connections to close")


@pytest.mark.thorough
def test_closed_clients_leave_nothing_in_a_loop_that_lives_on(
    server: Server, namespace: str, connect: Callable[..., Backend]
) -> None:
    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        for _ in range(300):
            client = connect(server.url)
            await LRUCache(backend=client).aio.get("k")
            await client.aclose()
        return len(loop._scheduled)

    assert asyncio.run(main()) < 200, "asyncio removes cancelled timers when there are more than a hundred"
