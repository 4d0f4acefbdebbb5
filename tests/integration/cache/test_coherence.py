"""The local copies in several processes are never older than allowed."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.errors import InvalidArgument
from tests.support.caches import copied
from tests.support.calls import Call
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers
from tests.torture.mutants import without_tickets

STALE_S = 0.25


DIVIDED = {"max_size": 4000, "shards": 16}
both = pytest.mark.parametrize("options", [{}, DIVIDED], ids=["one-shard", "16-shards"])
"""Whether a cache lies in one slot or in several."""


def with_copies(backend: Backend, **options: Any) -> LRUCache:
    return LRUCache(name="default", backend=backend, local_size=100, **options)


def test_local_copy_costs_no_command(call: Call, proxy: Proxy, connect: Callable[..., Backend], namespace: str) -> None:
    cache = with_copies(connect(proxy.url))
    call(cache, "put_many", {"k": [1], "none": None})
    for _ in range(10):
        with StallDetector() as stalls:
            begin = time.monotonic()
            copied(cache, "k")
            copied(cache, "none")
            before = proxy.count("MGET")

            values = [call(cache, "get", "k") for _ in range(10)]
            values[0].append(2)
            assert values[1:] == [[1]] * 9, "each caller has its own list"
            assert call(cache, "get", "none", "default") is None
            assert call(cache, "get_many", ["k", "none"]) == {"k": [1], "none": None}
            assert call(cache, "get_or_compute", "k", lambda: "never called") == [1]
            cost = proxy.count("MGET") - before
            # If the bus has been silent for 250 ms, as on a stalled machine, the cache does not use copies.
            if cost == 0 or stalls.within(begin, time.monotonic()) < 0.1:
                break
    assert cost == 0
    before = proxy.count("MGET")
    assert call(cache, "get", "k", fresh=True) == [1]
    assert call(cache, "get_many", ["k"], fresh=True) == {"k": [1]}
    assert proxy.count("MGET") == before + 2
    assert call(cache, "stats").hits >= 15, "hits of local copies count"


@both
def test_process_sees_its_own_writes_at_once(call: Call, backend: Backend, options: dict[str, int]) -> None:
    cache, plain = with_copies(backend, **options), LRUCache(name="default", backend=backend)
    for which in (cache, plain):
        for forget, left in (
            (("put", "k", "new"), "new"),
            (("put_many", {"k": "new"}), "new"),
            (("delete", "k"), None),
            (("invalidate_tags", "t"), None),
            (("clear",), None),
        ):
            call(cache, "put", "k", "old", tags=["t"])
            copied(cache, "k")
            call(which, *forget)
            assert call(cache, "get", "k") == left, forget


@both
def test_writes_of_other_processes_are_seen_in_time(
    server: Server, connect: Callable[..., Backend], options: dict[str, int]
) -> None:
    cache = with_copies(connect(server.url), **options)
    remote = LRUCache(name="default", backend=connect(server.url), **options)  # type: ignore[arg-type]
    for forget, left in (
        (lambda: remote.put("k", "new"), "new"),
        (lambda: remote.delete("k"), None),
        (lambda: remote.invalidate_tags("t"), None),
        (remote.clear, None),
    ):
        remote.put("k", "old", tags=["t"])
        cache.get("k", fresh=True)
        copied(cache, "k")
        forget()
        assert_seen_in_time(cache, left, time.monotonic())


def assert_seen_in_time(cache: LRUCache, left: object, acknowledged: float) -> None:
    """Read `k` until the result is `left`. A read that begins STALE_S after `acknowledged` must return `left`."""
    while True:
        begun = time.monotonic()
        if cache.get("k") == left:
            return
        assert begun - acknowledged <= STALE_S


def test_copy_expires_with_its_entry(backend: Backend) -> None:
    cache = with_copies(backend)
    local = cache._shared_state.local
    assert local is not None
    expires_at = []

    def copied_while_it_lives() -> bool:
        cache.put("k", 1, ttl=0.4)
        entry, value = cache.entry("k"), cache.get("k")
        if entry is None or entry.expires_at is None or value is None:
            return False
        expires_at.append(entry.expires_at.timestamp())
        return local.find("k") is not None

    wait_until(copied_while_it_lives, "a copy of k")
    begun = time.time()
    while cache.get("k") is not None:
        assert begun < expires_at[-1] + 0.002
        begun = time.time()


def test_copies_are_unused_while_bus_is_silent(proxy: Proxy, server: Server, connect: Callable[..., Backend]) -> None:
    """Requests still reach the server, but the closed bus delivers no message about the write."""
    cache, remote = with_copies(connect(proxy.url)), LRUCache(name="default", backend=connect(server.url))
    cache.put("k", "old")
    copied(cache, "k")
    cache._backend.bus.close()

    remote.put("k", "new")
    assert_seen_in_time(cache, "new", time.monotonic())
    assert all(cache.get("k") == "new" for _ in range(5))


def test_fill_begun_before_invalidation_is_refused(
    server: Server, proxy: Proxy, connect: Callable[..., Backend]
) -> None:
    left = interleaved(connect(proxy.url), connect(server.url), proxy)
    assert left == "new"


def test_fill_without_tickets_fails_the_check(
    server: Server, proxy: Proxy, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tickets(monkeypatch)
    backend, other = connect(proxy.url), connect(server.url)
    # On a stalled machine, a read may ignore the copy and return the new value from the server. So the test tries
    # five times.
    assert "old" in (interleaved(backend, other, proxy) for _ in range(5))


def interleaved(backend: Backend, other: Backend, proxy: Proxy) -> Any:
    """Hold the reply of a read until another process's write is reported. Return the result of the next read."""
    cache, remote = with_copies(backend), LRUCache(name="default", backend=other)
    remote.put("k", "old")
    remote.put("warm", 1)
    copied(cache, "warm")
    heard = threading.Event()
    cache._shared_state.local.drop("k")  # type: ignore[union-attr]  # `local` is not None: the cache has local copies
    subscription = backend.bus.subscribe(
        cache._shared_state.keys.bus, lambda message: heard.set() if message.endswith(b" k") else None, lambda: None
    )
    read = proxy.keep_reply(only=lambda request: request[0] == b"MGET" and request[1].endswith(b":e:k"))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(cache.get, "k")
        read.wait()
        assert read.answered.wait(10)
        heard.clear()  # all earlier messages were about the old value
        remote.put("k", "new")
        assert heard.wait(10)
        read.let_go()
        assert reading.result() in ("old", "new"), "the read itself was concurrent with the write"
    subscription.close()
    return cache.get("k")


def test_local_copies_are_shared_per_cache_and_process(backend: Backend) -> None:
    first, second = with_copies(backend), with_copies(backend)
    assert first._shared_state.local is second._shared_state.local
    with pytest.raises(InvalidArgument) as refused:
        LRUCache(name="default", backend=backend, local_size=5)
    assert refused.value.argument == "local_size"
    with pytest.raises(InvalidArgument):
        LRUCache(name="default", backend=backend, local_size=100, strict=True)


# In the test below, processes with local copies write and read, while the test cuts bus connections.

KEYS = [f"k{number}" for number in range(6)]
TAGS = ("even", "odd")


@dataclass(frozen=True)
class Write:
    """An acknowledged write of a unique value, or an acknowledged invalidation. An invalidation stores no value."""

    key: str
    value: tuple[int, int]
    begun: float
    acknowledged: float
    how: str = "put"


@dataclass(frozen=True)
class Read:
    """A read that found a value."""

    key: str
    value: tuple[int, int]
    begun: float
    fresh: bool


def change(cache: LRUCache, me: int, count: int, chance: random.Random) -> list[Write]:
    """Put a value or invalidate some keys. Return a `Write` for each affected key."""
    how = chance.choice(("put", "put", "put", "delete", "tag", "clear"))
    key, begun = chance.choice(KEYS), time.monotonic()
    concerned = [key]
    match how:
        case "put":
            cache.put(key, (me, count), tags=[TAGS[KEYS.index(key) % 2]])
        case "delete":
            cache.delete(key)
        case "tag":
            concerned = KEYS[KEYS.index(key) % 2 :: 2]
            cache.invalidate_tags(TAGS[KEYS.index(key) % 2])
        case _:
            concerned = KEYS
            cache.clear()
    acknowledged = time.monotonic()
    return [Write(each, (me, count), begun, acknowledged, how) for each in concerned]


def enough(writes: list[Write], reads: list[Read]) -> bool:
    """Return whether one process has made enough writes and reads."""
    return len(writes) > 10 and len(reads) > 300


def write_and_read(
    url: str, namespace: str, me: int, seconds: float, options: dict[str, int]
) -> tuple[list[Write], list[Read]]:
    """A worker process: write unique values to shared keys, invalidate the keys, read them, and record the times."""
    cache = with_copies(Backend(url, namespace=namespace), **options)
    writes, reads, chance, end = list[Write](), list[Read](), random.Random(me), time.monotonic() + seconds
    count = 0
    while time.monotonic() < end or not enough(writes, reads):
        key, choice = chance.choice(KEYS), chance.random()
        if choice < 0.06:
            writes += change(cache, me, count, chance)
            key, choice, count = (
                chance.choice(writes[-3:]).key,
                1.0,
                count + 1,
            )  # read a key that this process has just changed
        begun = time.monotonic()
        found = cache.get(key, fresh=choice < 0.15)
        if found is not None:
            reads.append(Read(key, found, begun, fresh=choice < 0.15))
        time.sleep(0.0005)
    cache._backend.close()
    return writes, reads


def stale(writes: list[Write], reads: list[Read], reader: int) -> list[str]:
    """Return the stale reads of one process.

    A read is stale if a newer write was acknowledged before the read began. There is one exception: for STALE_S after
    the acknowledgement of a write by another process, a read that may use a local copy may miss the write. A write is
    newer than another write if it began after the other write was acknowledged. Overlapping writes have no order.
    """
    by_value = {write.value: write for write in writes if write.how == "put"}
    by_key: dict[str, list[Write]] = {}
    for write in writes:
        by_key.setdefault(write.key, []).append(write)
    faults = []
    for read in reads:
        found = by_value[read.value]
        for write in by_key[read.key]:
            allowed = 0.0 if read.fresh or write.value[0] == reader else STALE_S
            if write.begun > found.acknowledged and write.acknowledged < read.begun - allowed:
                faults.append(f"{reader} read {found} at {read.begun} after {write}")
                break
    return faults


@pytest.mark.thorough
@both
def test_no_process_reads_too_old_values(
    server: Server, namespace: str, workers: Workers, raw: Raw, options: dict[str, int]
) -> None:
    seconds = 2.0
    processes = [workers.start(write_and_read, server.url, namespace, me, seconds, options) for me in range(4)]
    end, chance = time.monotonic() + seconds, random.Random(3)
    nodes = [node.client() for node in server.nodes]
    while time.monotonic() < end:  # cut bus connections at random
        chance.choice(nodes).client_kill_filter(_type="pubsub")
        time.sleep(chance.uniform(0.1, 0.6))
    done = [process.result() for process in processes]
    for node in nodes:
        node.close()

    writes = [write for written, _ in done for write in written]
    assert all(enough(written, read) for written, read in done)
    seen = {read.value[0] for _, reads in done for read in reads}
    assert seen == {0, 1, 2, 3}, "each process's values were read"
    assert {write.how for write in writes} == {"put", "delete", "tag", "clear"}
    assert [fault for me, (_, reads) in enumerate(done) for fault in stale(writes, reads, me)] == []


def test_staleness_check_finds_stale_reads() -> None:
    writes = [Write("k", (0, 0), 1.0, 1.1), Write("k", (0, 1), 2.0, 2.1), Write("other", (1, 0), 2.0, 2.1)]
    late, early = 2.1 + STALE_S + 0.01, 2.1 + STALE_S - 0.01
    assert stale(writes, [Read("k", (0, 0), late, fresh=False)], reader=1)
    assert not stale(writes, [Read("k", (0, 0), early, fresh=False), Read("k", (0, 1), late, fresh=False)], reader=1)
    assert stale(writes, [Read("k", (0, 0), early, fresh=True)], reader=1)
    assert stale(writes, [Read("k", (0, 0), early, fresh=False)], reader=0)
    gone = [writes[0], Write("k", (0, 1), 2.0, 2.1, "clear"), Write("other", (0, 1), 2.0, 2.1, "clear")]
    assert stale(gone, [Read("k", (0, 0), late, fresh=False)], reader=1)
    assert not stale(gone, [Read("k", (0, 0), early, fresh=False)], reader=1)


@pytest.mark.thorough
def test_threads_and_event_loop_share_coherent_copies(
    backend: Backend, connect: Callable[..., Backend], server: Server, runner: asyncio.Runner
) -> None:
    """Threads and tasks see each other's changes at once. They see a change by another process within STALE_S."""
    cache, remote = with_copies(backend), with_copies(connect(server.url))
    numbers, end = count(), time.monotonic() + 1.5
    writes, reads, others = list[Write](), list[Read](), list[Read]()

    def thread(number: int) -> None:
        which, me, into = (remote, 1, others) if number == 0 else (cache, 0, reads)
        chance = random.Random(number)
        while time.monotonic() < end:
            key, choice = chance.choice(KEYS), chance.random()
            if choice < 0.1:
                writes.extend(change(which, me, next(numbers), chance))
            begun = time.monotonic()
            found = which.get(key, fresh=choice > 0.9)
            if found is not None:
                into.append(Read(key, found, begun, fresh=choice > 0.9))
            time.sleep(0.0005)

    async def task(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            key, choice = chance.choice(KEYS), chance.random()
            if choice < 0.05:
                value, begun = (0, next(numbers)), time.monotonic()
                await cache.aio.put(key, value, tags=[TAGS[KEYS.index(key) % 2]])
                writes.append(Write(key, value, begun, time.monotonic()))
            elif choice < 0.07:
                value, begun = (0, next(numbers)), time.monotonic()
                await cache.aio.delete(key)
                writes.append(Write(key, value, begun, time.monotonic(), "delete"))
            begun = time.monotonic()
            found = await cache.aio.get(key, fresh=choice > 0.9)
            if found is not None:
                loops.append(Read(key, found, begun, fresh=choice > 0.9))
            await asyncio.sleep(0.0005)

    async def tasks() -> None:
        await asyncio.gather(*map(task, range(10, 16)))

    loops = list[Read]()
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(thread, number) for number in range(4)]
        runner.run(tasks())
        for each in running:
            each.result()

    assert stale(writes, reads + loops, reader=0) == []
    assert stale(writes, others, reader=1) == []
    assert {read.value[0] for read in reads} == {read.value[0] for read in loops} == {0, 1}, (
        "values of both processes were read"
    )
    local = cache._local
    assert local is not None
    assert local is cache.aio._local
