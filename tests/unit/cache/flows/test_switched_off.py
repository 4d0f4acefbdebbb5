"""A cache object of size 0 is off: it reads and stores nothing, computes every value, and needs no server for that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, cached
from agentperf_redis.errors import InvalidArgument, NoInteger


def off(backend: Backend) -> list[Any]:
    return [
        LRUCache(0, name="off", backend=backend, local_size=5),
        TieredCache(0, 0, 0, name="off", backend=backend),
    ]


ANSWERS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("put", ("k", 1), False),
    ("add", ("k", 1), False),
    ("replace", ("k", 1), False),
    ("put_many", ({"k": 1},), 0),
    ("get", ("k", "default"), "default"),
    ("get_many", (["k"],), {}),
    ("entry", ("k",), None),
    ("ttl", ("k",), None),
    ("touch", ("k", 5), False),
    ("incr", ("k", 3), 3),
    ("incr", ("k", 3), 3),
    ("flush", (), None),
]


def test_every_operation_is_a_miss_and_sends_nothing(dead_backend: Backend) -> None:
    for cache in off(dead_backend):
        assert repr(cache).endswith("('off', off)")
        for method, args, answer in ANSWERS:
            assert getattr(cache, method)(*args) == answer, method
            assert asyncio.run(getattr(cache.aio, method)(*args)) == answer, method
        assert cache.put_many({"k": 1}).refused == ("k",)
        assert cache.put("k", 1, if_version=0) is False
        with pytest.raises(NoInteger, match="there is no value"):
            cache.incr("k", create=False)


@pytest.mark.parametrize("kind", [0, 1])
def test_every_call_computes_even_unstorable_values(
    dead_backend: Backend, recwarn: pytest.WarningsRecorder, kind: int
) -> None:
    cache = off(dead_backend)[kind]
    calls: list[object] = []

    @cached(cache)
    def work() -> object:
        calls.append(object())
        return calls[-1]

    async def later() -> object:
        return object()

    assert [work(), work()] == calls
    assert len({cache.get_or_compute("k", object) for _ in range(3)}) == 3
    assert asyncio.run(cache.aio.get_or_compute("k", later)) is not None
    assert cache.warm_up(["a", "b"], str.upper).done == 2
    assert [each for each in recwarn if issubclass(each.category, RuntimeWarning)] == []


def test_one_process_has_no_cache_both_on_and_off(dead_backend: Backend) -> None:
    kept = [LRUCache(0, name="a", backend=dead_backend), TieredCache(name="b", backend=dead_backend)]
    kept.append(TieredCache(0, 0, 0, name="c", backend=dead_backend))
    for make, argument, value in (
        (lambda: LRUCache(5, name="a", backend=dead_backend), "max_size", 5),
        (lambda: TieredCache(0, 0, 0, name="b", backend=dead_backend), "hot_size", 0),
        (lambda: TieredCache(5, 6, 7, name="c", backend=dead_backend), "hot_size", 5),
    ):
        with pytest.raises(InvalidArgument, match="in this process") as refused:
            make()
        assert (refused.value.argument, refused.value.value) == (argument, value)
    LRUCache(0, name="a", backend=dead_backend)
    kept.clear()
    assert LRUCache(5, name="a", backend=dead_backend).max_size == 5


def test_error_of_a_function_reaches_its_caller(dead_backend: Backend) -> None:
    def work() -> int:
        raise StopIteration("no value")

    for cache in off(dead_backend):
        with pytest.raises(StopIteration, match="no value"):
            cache.get_or_compute("k", work)


def test_arguments_are_checked_as_ever(dead_backend: Backend) -> None:
    for cache in off(dead_backend):
        wrong = [
            *[("get", (5,)), ("put", ("k", object())), ("put_many", (5,)), ("incr", ("k", True)), ("touch", ("k", 0))],
            *[("get_or_compute", ("k", 5)), ("get_many", ("abc",)), ("ttl", (None,)), ("entry", (5,))],
        ]
        for method, args in wrong:
            with pytest.raises(InvalidArgument):
                getattr(cache, method)(*args)
