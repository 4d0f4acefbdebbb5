"""add, incr, touch, pop and compare-and-set are executed once, even if their requests arrive several times or late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.script import Script
from tests.support.cache_scan import faults
from tests.support.calls import Call
from tests.support.proxy import Proxy, Request, matches
from tests.support.servers import Raw, Server
from tests.support.workers import Workers

PUT, POP = Script("cache/put"), Script("cache/pop")

OPERATIONS: dict[str, tuple[str, tuple[Any, ...], Any, Any]] = {
    "add": ("add", ("new", 1), True, ("new", 1)),
    "replace": ("replace", ("k", 5), True, ("k", 5)),
    "incr": ("incr", ("k", 5), 12, ("k", 12)),
    "incr new": ("incr", ("new", 5), 5, ("new", 5)),
    "touch": ("touch", ("k", 60), True, ("k", 7)),
    "pop": ("pop", ("k",), 7, ("k", None)),
}
"""Method, its arguments, its result, and a key with its value after the call. Before the call, the value of k is 7."""


FURTHER_FAULTS = ("half_reply", "reset_before_request")


@pytest.fixture(params=[LRUCache, pytest.param(TieredCache, marks=pytest.mark.thorough)])
def cache(request: pytest.FixtureRequest, proxy: Proxy, connect: Callable[..., Backend]) -> Any:
    made = request.param(name="c", backend=connect(proxy.url))
    made.put("k", 7)
    made.pop("other")  # the scripts PUT and POP are now loaded, so a test can count their calls
    return made


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "fault",
    ["reset_after_reply", *(pytest.param(fault, marks=pytest.mark.thorough) for fault in FURTHER_FAULTS)],
)
def test_operation_with_a_lost_reply_is_executed_once(
    call: Call, cache: Any, proxy: Proxy, raw: Raw, namespace: str, operation: str, fault: str
) -> None:
    method, args, result, (key, after) = OPERATIONS[operation]
    script = POP if method == "pop" else PUT
    lost, before = getattr(proxy, fault)(only=script), proxy.count(script)

    assert call(cache, method, *args) == result

    assert lost.caught.is_set()
    assert proxy.count(script) - before == 2
    assert call(cache, "get", key) == after
    assert faults(raw, namespace, cache._service, "c") == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_late_copy_changes_nothing(call: Call, cache: Any, proxy: Proxy, operation: str) -> None:
    """The second copy of the request is executed, and the value is replaced. Only then does the first copy arrive."""
    method, args, result, (key, _) = OPERATIONS[operation]
    held = proxy.hold(only=POP if method == "pop" else PUT)
    assert call(cache, method, *args) == result
    call(cache, "put", key, 100)
    version = call(cache, "entry", key).version

    held.deliver()

    entry = call(cache, "entry", key)
    assert (entry.value, entry.version) == (100, version)


@pytest.mark.parametrize(("method", "args", "refusal"), [("replace", ("k", 5), False), ("pop", ("k",), None)])
def test_late_copy_after_a_data_loss_changes_nothing(
    call: Call, cache: Any, proxy: Proxy, raw: Raw, namespace: str, method: str, args: tuple[Any, ...], refusal: Any
) -> None:
    """The second copy of the request finds no settings and is refused. The first copy arrives after a new put."""
    held = proxy.hold(only=POP if method == "pop" else PUT)
    raw.delete(*raw.scan_iter(match=f"{namespace}:*:c}}:*"))
    assert call(cache, method, *args) is refusal
    call(cache, "put", "k", 100)

    held.deliver()

    assert call(cache, "get", "k") == 100


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cancelled_operation_is_not_executed_later(
    cache: Any, proxy: Proxy, runner: asyncio.Runner, operation: str
) -> None:
    method, args, _, (key, _) = OPERATIONS[operation]
    held = proxy.hold(only=POP if method == "pop" else PUT, reset=False)

    async def scene() -> int:
        task = asyncio.create_task(getattr(cache.aio, method)(*args))
        await asyncio.to_thread(held.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cache.aio.put(key, 100)
        version: int = (await cache.aio.entry(key)).version
        return version

    version = runner.run(scene())
    held.deliver()

    entry = cache.entry(key)
    assert (entry.value, entry.version) == (100, version)


def test_lost_replies_to_the_end_say_that_the_effect_is_unknown(
    call: Call, proxy: Proxy, connect: Callable[..., Backend]
) -> None:
    cache = LRUCache(name="c", backend=connect(proxy.url, deadline=0.3))
    call(cache, "put", "k", 1)
    for method, script in (("incr", PUT), ("pop", POP)):
        proxy.reset_after_reply(only=script, times=float("inf"))
        with pytest.raises(BackendUnavailable) as lost:
            call(cache, method, "k")
        assert lost.value.outcome == "unknown"
        proxy.clear()


# Races of processes

PROCESSES = 8


class Every:
    """Selects every n-th call of a script."""

    def __init__(self, nth: int, script: Script = PUT) -> None:
        self._nth = nth
        self._script = script
        self._seen = 0

    def __call__(self, request: Request) -> bool:
        if matches(self._script, request):
            self._seen += 1
            return self._seen % self._nth == 0
        return False


def add_all(url: str, namespace: str, keys: int, block: int) -> Iterator[list[str]]:
    """A worker process: add every key, block by block. Yield the keys of each block for which `add` returned True."""
    backend = Backend(url, namespace=namespace)
    cache = LRUCache(keys, name="c", backend=backend)
    yield []
    for first in range(0, keys, block):
        yield [f"k{number}" for number in range(first, first + block) if cache.add(f"k{number}", 1)]
    backend.close()


@pytest.mark.thorough
def test_one_process_wins_each_of_ten_thousand_adds(server: Server, namespace: str, workers: Workers) -> None:
    keys, block = 10_000, 100
    racing = [workers.start(add_all, server.url, namespace, keys, block) for _ in range(2)]
    assert [worker.said() for worker in racing] == [[], []]
    won: list[str] = []
    for _ in range(0, keys, block):  # both workers begin a block at the same time
        for worker in racing:
            worker.answer()
        for worker in racing:
            won += worker.said()
    assert sorted(won) == sorted(f"k{number}" for number in range(keys))


def add_in_step(url: str, namespace: str, rounds: int) -> Iterator[bool | None]:
    """A worker process: in each round, add one key after the test's signal."""
    backend = Backend(url, namespace=namespace)
    cache = LRUCache(3, name="c", backend=backend)
    yield None
    for number in range(rounds):
        yield cache.add(f"k{number}", 1)
    backend.close()


@pytest.mark.thorough
def test_one_process_wins_each_add_on_a_full_cache(
    server: Server, namespace: str, workers: Workers, proxy: Proxy
) -> None:
    """Every second reply to one process is lost, and every add evicts an entry."""
    rounds = 300
    proxy.reset_after_reply(only=Every(2), times=float("inf"))
    started = [workers.start(add_in_step, url, namespace, rounds) for url in (server.url, proxy.url)]
    for worker in started:
        worker.said()
    for number in range(rounds):
        for worker in started:
            worker.answer()
        assert sorted(worker.said() for worker in started) == [False, True], number


def count(url: str, namespace: str, seed: int, rounds: int) -> int:
    """A worker process: increment a counter in steps of random size. Return the sum of the steps."""
    backend = Backend(url, namespace=namespace, deadline=30)
    cache, chance, added = TieredCache(name="c", backend=backend), random.Random(seed), 0
    for _ in range(rounds):
        by = chance.randrange(-500, 1000)
        cache.incr("n", by)
        added += by
    backend.close()
    return added


@pytest.mark.thorough
@pytest.mark.standalone
@pytest.mark.parametrize("lossy", [False, True])
def test_eight_processes_count_exactly(
    server: Server,
    namespace: str,
    workers: Workers,
    backend: Backend,
    make_proxy: Callable[[Server], Proxy],
    *,
    lossy: bool,
) -> None:
    urls = [server.url] * PROCESSES
    if lossy:
        proxies = [make_proxy(server) for _ in range(PROCESSES)]
        for number, proxy in enumerate(proxies):
            fault = (proxy.reset_after_reply, proxy.half_reply, proxy.reset_before_request)[number % 3]
            fault(only=Every(3), times=float("inf"))
        urls = [proxy.url for proxy in proxies]
    added = workers.run(count, [(url, namespace, seed, 300) for seed, url in enumerate(urls)], timeout=300)
    assert TieredCache(name="c", backend=backend).get("n") == sum(added)
    if lossy:
        assert all(proxy.count(PUT) > 300 for proxy in proxies), "replies were lost"


def raise_by_version(url: str, namespace: str, rounds: int) -> int:
    """A worker process: replace a number by its successor, by compare and set. Return how often that succeeded."""
    backend = Backend(url, namespace=namespace, deadline=30)
    cache, done = LRUCache(name="c", backend=backend), 0
    for _ in range(rounds):
        entry = cache.entry("n")
        value, version = (0, 0) if entry is None else (entry.value, entry.version)
        done += cache.put("n", value + 1, if_version=version)
    backend.close()
    return done


@pytest.mark.thorough
@pytest.mark.standalone
@pytest.mark.parametrize("lossy", [False, True])
def test_compare_and_set_never_overwrites_a_newer_value(
    server: Server,
    namespace: str,
    workers: Workers,
    backend: Backend,
    make_proxy: Callable[[Server], Proxy],
    *,
    lossy: bool,
) -> None:
    """Each success adds 1 to the value that it replaces. If it overwrote a newer value, the sum would be too low."""
    urls = [server.url] * 4
    if lossy:
        proxies = [make_proxy(server) for _ in range(4)]
        for proxy in proxies:
            proxy.reset_after_reply(only=Every(3), times=float("inf"))
        urls = [proxy.url for proxy in proxies]
    done = workers.run(raise_by_version, [(url, namespace, 300) for url in urls], timeout=300)
    assert LRUCache(name="c", backend=backend).get("n") == sum(done)


def take(url: str, namespace: str) -> list[int]:
    """A worker process: pop keys until there are none. Return the values."""
    backend = Backend(url, namespace=namespace, deadline=30)
    cache, taken = LRUCache(5000, name="c", backend=backend), []
    for number in range(600):
        value = cache.pop(f"k{number}")
        if value is not None:
            taken.append(value)
    backend.close()
    return taken


@pytest.mark.thorough
def test_each_value_is_popped_once(
    server: Server, namespace: str, workers: Workers, backend: Backend, proxy: Proxy
) -> None:
    cache = LRUCache(5000, name="c", backend=backend)
    cache.put_many({f"k{number}": number for number in range(600)})
    proxy.reset_after_reply(only=Every(3, POP), times=float("inf"))
    taken = workers.run(take, [(url, namespace) for url in (server.url, proxy.url, server.url)], timeout=300)
    assert sorted(chain(*taken)) == list(range(600))
    assert cache.size() == 0


def touch_and_delete(url: str, namespace: str, deletes: bool, rounds: int) -> int:
    """A worker process: touch a key, or delete it and check that it stays deleted. Return how often it came back."""
    backend = Backend(url, namespace=namespace, deadline=30)
    cache, came_back = LRUCache(name="c", backend=backend), 0
    for number in range(rounds):
        if not deletes:
            cache.touch("k", 60 + number % 7)
            continue
        cache.put("k", number, ttl=60)
        cache.delete("k") if number % 2 else cache.clear()
        came_back += any(cache.get("k") is not None or cache.ttl("k") is not None for _ in range(3))
    backend.close()
    return came_back


@pytest.mark.thorough
def test_touch_never_resurrects_a_value(server: Server, namespace: str, workers: Workers, proxy: Proxy) -> None:
    proxy.reset_after_reply(only=Every(3), times=float("inf"))
    urls = [(server.url, True), (server.url, False), (proxy.url, False), (proxy.url, False)]
    came_back = workers.run(touch_and_delete, [(url, namespace, deletes, 400) for url, deletes in urls], timeout=300)
    assert came_back == [0] * 4
