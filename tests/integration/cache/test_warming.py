"""Warm-up: missing values are computed once, a bounded number at a time, and the caller sees the progress."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.cache.warm_up import WarmUpStatus
from agentperf_redis.errors import BackendUnavailable
from tests.support.calls import Call
from tests.support.servers import Server
from tests.support.workers import Workers


class Busy:
    """A function that records how many of its calls run at once."""

    def __init__(self, takes_s: float = 0.02) -> None:
        self.takes_s = takes_s
        self.calls: list[str] = []
        self.maximum = self._now = 0
        self._lock = threading.Lock()
        self.met = threading.Event()
        """Set when two calls run at once. A test without concurrent calls sets this event at the start."""

    def __call__(self, key: str) -> str:
        with self._lock:
            self.calls.append(key)
            self._now += 1
            self.maximum = max(self.maximum, self._now)
            if self._now > 1:
                self.met.set()
        self.met.wait(10)
        time.sleep(self.takes_s)
        with self._lock:
            self._now -= 1
        return key.upper()

    async def later(self, key: str) -> str:
        self.calls.append(key)
        self._now += 1
        self.maximum = max(self.maximum, self._now)
        end = time.monotonic() + 10
        while self.maximum < 2 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.takes_s)
        self._now -= 1
        return key.upper()


def test_missing_values_are_computed_with_bounded_concurrency(call: Call, backend: Backend) -> None:
    cache, busy = TieredCache(backend=backend), Busy()
    keys = [f"k{number}" for number in range(30)]
    cache.put("k7", "there")
    reports: list[WarmUpStatus] = []

    warmed = call(
        cache, "warm_up", keys, busy.later if call.is_async else busy, 60, concurrency=5, progress=reports.append
    )

    assert (warmed.done, warmed.total, warmed.computed, warmed.errors) == (30, 30, 29, {})
    assert sorted(busy.calls) == sorted(set(keys) - {"k7"})
    assert 2 <= busy.maximum <= 5
    assert [each.done for each in reports] == list(range(1, 31))
    assert reports[-1] == warmed
    assert cache.get_many(keys) == {key: "there" if key == "k7" else key.upper() for key in keys}
    entry = cache.entry("k0")
    assert entry is not None
    assert entry.expires_at is not None


def warm_in_worker(url: str, namespace: str, count: int) -> tuple[int, int]:
    cache, busy = LRUCache(name="default", backend=Backend(url, namespace=namespace)), Busy(0.01)
    busy.met.set()
    warmed = cache.warm_up([f"k{number}" for number in range(count)], busy)
    assert warmed.done == count
    return len(busy.calls), warmed.computed


@pytest.mark.thorough
def test_processes_warm_each_common_key_once(
    server: Server, namespace: str, workers: Workers, backend: Backend
) -> None:
    results = workers.run(warm_in_worker, [(server.url, namespace, 100)] * 3)

    assert sum(calls for calls, _ in results) == sum(computed for _, computed in results) == 100
    assert LRUCache(name="default", backend=backend).size() == 100


def test_function_error_ends_only_its_value(call: Call, backend: Backend) -> None:
    cache = LRUCache(backend=backend)

    def work(key: str) -> str:
        if key in "bd":
            raise KeyError(key)
        return key

    warmed = call(cache, "warm_up", (key for key in "abcde"), work)

    assert (warmed.done, warmed.total, warmed.computed) == (5, None, 3)
    assert {key: type(error) for key, error in warmed.errors.items()} == {"b": KeyError, "d": KeyError}
    assert sorted(cache.keys()) == ["a", "c", "e"]


def test_keys_are_consumed_only_as_needed(call: Call, backend: Backend) -> None:
    cache, taken = LRUCache(backend=backend), []

    def keys() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield f"k{number}"

    def give_up(warmed: WarmUpStatus) -> None:
        if warmed.done == 10:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        call(cache, "warm_up", keys(), str.upper, concurrency=4, progress=give_up)

    assert 10 <= len(taken) <= 14


def test_decorated_function_is_warmed_by_its_arguments(backend: Backend, runner: asyncio.Runner) -> None:
    cache = LRUCache(backend=backend)
    calls: list[Any] = []

    @cache.cached(60)
    def add(x: int, y: int = 1) -> int:
        calls.append((x, y))
        return x + y

    @cache.cached(60)
    async def double(x: int) -> int:
        calls.append(x)
        return 2 * x

    warmed = add.warm([1, (2, 3), (2,), 1], concurrency=2)
    assert (warmed.done, warmed.total, warmed.computed) == (4, 4, 3)
    assert [add(1), add(2, 3), add(2)] == [2, 5, 3]
    assert sorted(calls) == [(1, 1), (2, 1), (2, 3)]
    assert runner.run(double.warm(range(5))).computed == 5
    assert runner.run(double(4)) == 8
    assert len(calls) == 8


def test_warm_up_computes_nothing_during_an_outage(call: Call, connect: Callable[..., Backend]) -> None:
    cache, busy = LRUCache(backend=connect("redis://127.0.0.1:1/0", deadline=0.2)), Busy()

    with pytest.raises(BackendUnavailable):
        call(cache, "warm_up", [f"k{number}" for number in range(100)], busy)

    assert busy.calls == []
