"""Programs lose nothing and read nothing stale while the shards of their caches change and the command is killed."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.flows.resharding import Resharding
from agentperf_redis.cache.model import Settings
from tests.support.cache_scan import faults
from tests.support.servers import Raw, Server
from tests.support.workers import Workers

pytestmark = [pytest.mark.thorough, pytest.mark.servers("cluster")]

PROCESSES = 4
KEYS = 250
"""Keys that a process owns. Only the owner writes them, so it knows which values a read may return."""
FULL_SIZE = 4000
STOP = "stop"


class Own:
    """The keys of one process in one cache, and checks of each result against the acknowledged writes.

    Args:
        cache: the cache.
        number: the process.
        clears: counts the begun and the finished clears of all processes.
        is_full: whether entries may be evicted.
        copies: whether the cache has local copies, which another process's clear reaches a little later.

    The cache that may be full is never cleared.
    """

    def __init__(self, cache: LRUCache, number: int, clears: Clears, is_full: bool, copies: bool) -> None:
        self.cache, self.clears, self.is_full, self.copies = cache, clears, is_full, copies
        self.names = [f"{number}:{at}" for at in range(KEYS)]
        self.tag = f"tag {number}"
        self.state: dict[str, tuple[int, int, int] | None] = dict.fromkeys(self.names)
        """The last acknowledged write of each key: its value, the number of clears that had ended when the write began,
        and the number of clears that had begun when the write was acknowledged. None if the key has no value."""
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last

    def wrote(self, name: str, value: int, done: int) -> None:
        """Note an acknowledged write. `done` clears had finished before the write began."""
        self.state[name] = value, done, self.clears.begun()

    def stored(self, stored: bool, name: str, value: int, done: int) -> None:
        """Note the result of a put. A refused put may have left the old value or removed it."""
        if stored:
            self.wrote(name, value, done)
            return
        before, found = self.state[name], self.cache.get(name)
        assert found is None or (before is not None and found == before[0])
        if found is None:
            self.state[name] = None

    def check(self, name: str, found: object, done: int) -> None:
        """Check the result of a read. `done` clears had finished before the read began."""
        state = self.state[name]
        if found is None:
            lost = state is not None and not self.is_full and self.clears.begun() <= state[1]
            assert not lost, f"{name}: lost {state}"
            self.state[name] = None
            return
        assert state is not None, f"{name}: {found} returned after its removal"
        assert found == state[0], f"{name}: {found} instead of {state}"
        if not (self.copies or self.is_full):
            assert done <= state[2], f"{name}: {found} returned after a clear"

    def operate(self, luck: random.Random) -> None:
        """Run one operation on a random key."""
        cache, name = self.cache, luck.choice(self.names)
        done = self.clears.finished()
        match luck.randrange(12):
            case 0 | 1 | 2:
                value = self.next()
                self.stored(cache.put(name, value, tags=[self.tag]), name, value, done)
            case 3 | 4:
                self.check(name, cache.get(name), done)
            case 5:
                if not cache.delete(name):
                    self.check(name, None, done)
                self.state[name] = None
            case 6:
                self.check(name, cache.pop(name), done)
                self.state[name] = None
            case 7:
                before, value = self.state[name], self.next()
                if cache.add(name, value, tags=[self.tag]):
                    self.check(name, None, done)
                    self.wrote(name, value, done)
                else:
                    assert before is not None, f"{name}: there was a value"
            case 8:
                state = self.state[name]
                found = cache.incr(name, 1, tags=[self.tag])
                if state is None or found != state[0] + 1:
                    assert found == 1, f"{name}: {found} after {state}"
                    self.check(name, None, done)
                self.last = max(self.last, found)
                self.wrote(name, found, done)
            case 9:
                value = self.next()
                some = luck.sample(self.names, 5)
                stored = cache.put_many(dict.fromkeys(some, value), tags=[self.tag])
                for each in some:
                    self.stored(each not in stored.refused, each, value, done)
            case 10:
                some = luck.sample(self.names, 20)
                found_many = cache.get_many(some)
                for each in some:
                    self.check(each, found_many.get(each), done)
            case 11:
                if not luck.randrange(40):
                    cache.invalidate_tags(self.tag)
                    self.state = dict.fromkeys(self.names)
                    return
                value = self.next()
                found = cache.get_or_compute(name, lambda: value, tags=[self.tag])
                state = self.state[name]
                if found == value:
                    self.check(name, None, done)
                    again = cache.get(name)  # a value that is computed during the switch of layouts is not stored
                    assert again in (None, value)
                    self.state[name] = None
                    if again is not None:
                        self.wrote(name, value, done)
                else:
                    self.check(name, found, done)


class Clears:
    """Counts the clears of all processes. No other operation affects the keys of another process."""

    def __init__(self, raw: Any, namespace: str) -> None:
        self._raw, self._begun, self._finished = raw, f"{namespace}:begun", f"{namespace}:finished"

    def begun(self) -> int:
        return int(self._raw.get(self._begun) or 0)

    def finished(self) -> int:
        return int(self._raw.get(self._finished) or 0)

    def clear(self, cache: LRUCache) -> None:
        self._raw.incr(self._begun)
        cache.clear()
        self._raw.incr(self._finished)


def use(url: str, namespace: str, number: int, port: int) -> Generator[int, None, int]:
    """Use both caches until the test sets the key STOP. Yields when they are filled. Returns the number of rounds."""
    import redis

    luck, count = random.Random(number), 0
    raw = redis.RedisCluster(host="127.0.0.1", port=port, decode_responses=True)
    clears = Clears(raw, namespace)
    with AgentPerf(url, namespace=namespace, deadline=20.0) as perf:
        copies = number % 2 == 1
        large = perf.cache("plain", max_size=100_000, local_size=500 if copies else None)
        plain = Own(large, number, clears, is_full=False, copies=copies)
        full = Own(perf.cache("full", max_size=FULL_SIZE), number, clears, is_full=True, copies=False)
        for own in (plain, full):
            value = own.next()
            own.cache.put_many(dict.fromkeys(own.names, value), tags=[own.tag])
            for name in own.names:
                own.wrote(name, value, 0)
        full.cache.put_many({f"filler {number}:{at}": at for at in range(FULL_SIZE // PROCESSES)})
        yield 0
        while not (count % 20 == 0 and raw.get(f"{namespace}:{STOP}")):
            plain.operate(luck)
            full.operate(luck)
            full.cache.put(f"filler {number}:{luck.randrange(FULL_SIZE)}", count)
            count += 1
    raw.close()
    return count


def reshard(url: str, namespace: str, name: str, shards: int, pause_after: int) -> Iterator[int]:
    """Change the number of shards. Yields once after some steps, and at the end."""
    with AgentPerf(url, namespace=namespace, deadline=20.0) as perf:
        change = Resharding(perf.backend, "cache", name, shards)
        state = perf.backend.run(change.begin())
        assert state is not None
        steps = 0
        while not state.done:
            state = perf.backend.run(change.step())
            steps += 1
            if steps == pause_after:
                yield state.left
        yield 0


def entries(raw: Raw, namespace: str, name: str) -> int | None:
    """Return the number of stored entries, or None if the layout changes during the count.

    Entries that move from one layout to the other during the count may be missing.
    """
    own = keys.cache(namespace, "cache", name).meta
    text = raw.hget(own, "settings")
    settings = Settings.parse(text)
    assert settings is not None
    where = keys.cache_shards(namespace, "cache", name, settings.shards, settings.layout)
    # Entries move from the previous layout to the current layout. The current layout is read first, so that no entry
    # is counted twice.
    found = sum(raw.hlen(each.size) for each in where)
    if settings.source:
        old = keys.cache_shards(namespace, "cache", name, settings.source, settings.layout - 1)
        found += sum(raw.hlen(each.size) for each in old)
    return found if raw.hget(own, "settings") == text else None


def test_changes_under_load_lose_nothing(server: Server, raw: Raw, namespace: str, workers: Workers) -> None:
    users = [workers.start(use, server.url, namespace, number, server.nodes[0].port) for number in range(PROCESSES)]
    for user in users:
        user.said()
        user.answer()
    sizes: list[int] = []

    def look() -> None:
        found = entries(raw, namespace, "full")
        if found is not None:
            sizes.append(found)

    clears = Clears(raw, namespace)
    operator = AgentPerf(server.url, namespace=namespace, deadline=20.0)
    plain = operator.cache("plain")
    for shards in (16, 4):
        for name in ("plain", "full"):
            command = workers.start(reshard, server.url, namespace, name, shards, 6)
            assert command.said() > 0, "the command is killed half-way"
            command.answer()
            time.sleep(random.Random(shards).uniform(0.0, 0.02))
            command.kill()
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                look()
            if shards == 4 and name == "plain":
                clears.clear(plain)
            change = Resharding(operator.backend, "cache", name, shards)
            state = operator.backend.run(change.begin())
            while state is not None and not state.done:
                state = operator.backend.run(change.step())
                look()
            assert state is not None
    raw.set(f"{namespace}:{STOP}", 1)
    counts = [user.result() for user in users]
    operator.close()
    assert min(counts) > 50
    assert sizes
    assert max(sizes) <= FULL_SIZE
    for name in ("plain", "full"):
        assert faults(raw, namespace, "cache", name) == []
