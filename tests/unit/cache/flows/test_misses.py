"""A cache with on_unavailable="miss" answers each operation while the server is unreachable."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.errors import BackendUnavailable, InvalidArgument

ANSWERS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("get", ("k", "default"), "default"),
    ("get_many", (["k"],), {}),
    ("entry", ("k",), None),
    ("ttl", ("k",), None),
    ("put", ("k", 1), False),
    ("add", ("k", 1), False),
    ("replace", ("k", 1), False),
    ("put_many", ({"k": 1, "l": 2},), 0),
    ("touch", ("k", 5), False),
    ("pop", ("k", "default"), "default"),
    ("delete", ("k",), False),
    ("delete_many", (["k"],), 0),
    ("clear", (), None),
    ("invalidate_tags", ("t",), None),
    ("get_or_compute", ("k", lambda: 5), 5),
]
RAISING: list[tuple[str, tuple[Any, ...]]] = [
    *[("incr", ("k",)), ("keys", ()), ("size", ()), ("stats", ()), ("series", ()), ("sweep", ())],
    ("warm_up", (["k"], str.upper)),
]


@pytest.fixture
def nowhere() -> Iterator[Backend]:
    backend = Backend("redis://127.0.0.1:1", deadline=0.02)
    yield backend
    backend.close()


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [LRUCache, TieredCache])
def test_operations_are_misses_during_an_outage(nowhere: Backend, kind: Any) -> None:
    cache = kind(name="c", backend=nowhere, on_unavailable="miss")
    for method, args, answer in ANSWERS:
        assert getattr(cache, method)(*args) == answer, method
        assert asyncio.run(getattr(cache.aio, method)(*args)) == answer, method
    assert cache.put_many({"k": 1, "l": 2}).refused == ("k", "l")
    assert cache.put("k", 1, if_version=0) is False


@pytest.mark.parametrize(("method", "args"), RAISING, ids=lambda part: part if isinstance(part, str) else "")
def test_operations_without_a_true_answer_raise(nowhere: Backend, method: str, args: tuple[Any, ...]) -> None:
    cache = LRUCache(name="c", backend=nowhere, on_unavailable="miss")
    with pytest.raises(BackendUnavailable):
        getattr(cache, method)(*args)
    with pytest.raises(BackendUnavailable):
        next(cache.scan())


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["compute", "raise"])
def test_other_policies_raise_during_an_outage(nowhere: Backend, policy: str) -> None:
    cache = LRUCache(name="c", backend=nowhere, on_unavailable=policy)
    for method, args, _ in ANSWERS[:-1]:
        with pytest.raises(BackendUnavailable):
            getattr(cache, method)(*args)


def test_invalid_arguments_are_refused_during_an_outage(nowhere: Backend) -> None:
    cache = LRUCache(name="c", backend=nowhere, on_unavailable="miss")
    for method, args in (("get", (5,)), ("put", ("k", object())), ("put_many", (5,)), ("pop", (None,))):
        with pytest.raises(InvalidArgument):
            getattr(cache, method)(*args)
