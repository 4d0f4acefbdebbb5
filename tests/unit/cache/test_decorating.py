"""What cannot be decorated or computed is refused where it is written, before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.errors import InvalidArgument


@pytest.fixture
def cache() -> Iterator[LRUCache]:
    backend = Backend("redis://127.0.0.1:1", deadline=0.05)
    yield LRUCache(backend=backend)
    backend.close()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("tags", "news"),
        ("tags", 5),
        ("tags", [""]),
        ("ignore", "self"),
        ("ignore", 5),
        ("ignore", ("nobody",)),
        ("key", 5),
        ("key", "{nobody}"),
        ("version", None),
        ("version", True),
        ("ttl", "5"),
        ("ttl", len),
    ],
)
def test_a_decorator_names_the_argument_that_cannot_be(cache: LRUCache, argument: str, value: Any) -> None:
    options = {argument: value}
    with pytest.raises(InvalidArgument) as refused:

        @cache.cached(**options)
        def function(self: object) -> None: ...

    assert refused.value.argument == argument


def test_tags_that_can_be_taken_once_serve_all_that_is_decorated(cache: LRUCache) -> None:
    decorator = cache.cached(tags=iter(["news"]), ignore=iter(["x"]))

    def one(x: int) -> int:
        return x

    def two(x: int) -> int:
        return -x

    assert decorator(one).key(1) == decorator(one).key(2)
    assert decorator(two).key(1) == decorator(two).key(2)


def test_what_is_to_compute_is_a_function(cache: LRUCache) -> None:
    nothing: Any = 5
    for call in (lambda: cache.get_or_compute("k", nothing), lambda: cache.warm_up(["k"], nothing)):
        with pytest.raises(InvalidArgument, match="function is 5"):
            call()
