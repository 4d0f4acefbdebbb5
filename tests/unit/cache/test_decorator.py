"""Invalid decorations and functions are refused at once, before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import agentperf_redis
import agentperf_redis.cache
from agentperf_redis.backend import Backend
from agentperf_redis.cache import AsyncLRUCache, AsyncTieredCache, LRUCache, TieredCache
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
        ("ignore", ("unknown",)),
        ("key", 5),
        ("key", "{unknown}"),
        ("version", None),
        ("version", True),
        ("ttl", "5"),
        ("ttl", len),
    ],
)
def test_decorator_names_the_invalid_argument(cache: LRUCache, argument: str, value: Any) -> None:
    options = {argument: value}
    with pytest.raises(InvalidArgument) as refused:

        @cache.cached(**options)
        def function(self: object) -> None: ...

    assert refused.value.argument == argument


def test_one_shot_iterables_apply_to_every_decorated_function(cache: LRUCache) -> None:
    decorator = cache.cached(tags=iter(["news"]), ignore=iter(["x"]))

    def one(x: int) -> int:
        return x

    def two(x: int) -> int:
        return -x

    assert decorator(one).key(1) == decorator(one).key(2)
    assert decorator(two).key(1) == decorator(two).key(2)


def test_methods_of_decorated_function_are_documented(cache: LRUCache) -> None:
    @cache.cached()
    def blocking(x: int) -> int:
        return x

    @cache.cached()
    async def coroutine(x: int) -> int:
        return x

    for function in (blocking, coroutine):
        for name in ("invalidate", "refresh", "warm", "cache_clear", "cache_info", "key"):
            part = getattr(function, name)
            assert (part.__name__, bool(part.__doc__)) == (name, True)


def test_types_in_public_signatures_are_exported() -> None:
    named: set[str] = set()
    for each in (LRUCache, TieredCache, AsyncLRUCache, AsyncTieredCache, agentperf_redis.cached):
        methods = (
            vars(each).values() if not isinstance(each, type) else (m for k in each.__mro__ for m in vars(k).values())
        )
        for method in (each, *methods):
            for annotation in getattr(method, "__annotations__", {}).values():
                named.update(re.findall(r"[A-Z]\w+", str(annotation)))
    ours = {name for name in named if hasattr(agentperf_redis.cache, name)}
    assert {"FreshnessOptions", "WarmUpStatus", "CacheStats", "Policy", "Tier", "WithoutServer"} <= ours
    assert ours <= set(agentperf_redis.__all__)


def test_non_callable_function_is_refused(cache: LRUCache) -> None:
    nothing: Any = 5
    for call in (lambda: cache.get_or_compute("k", nothing), lambda: cache.warm_up(["k"], nothing)):
        with pytest.raises(InvalidArgument, match="function is 5"):
            call()


def test_blocking_call_refuses_coroutine_function_naming_aio(cache: LRUCache) -> None:
    async def fetch(key: str = "k") -> str:
        return key

    for method, call in (
        ("get_or_compute", lambda: cache.get_or_compute("k", fetch)),
        ("warm_up", lambda: cache.warm_up(["k"], fetch)),
        ("", lambda: cache.get_or_compute("k", lambda: fetch("k"))),  # only a call of the lambda reveals the coroutine
    ):
        with pytest.raises(InvalidArgument, match=rf"\.aio\.?{method}") as refused:
            call()
        assert refused.value.argument == "function"


def test_order_of_keyword_arguments_counts_only_in_kwargs(cache: LRUCache) -> None:
    @cache.cached()
    def query(host: str, port: int = 80, **fields: object) -> str:
        return f"{host}:{port}?{fields}"

    keys = {query.key("h", a=1, b=2), query.key("h", b=2, a=1), query.key("h", b=1, a=2), query.key("h", a=1)}
    assert len(keys) == 4, "the function sees the order of its **kwargs"
    assert query.key("h", b=2, port=80, a=1) == query.key(b=2, host="h", a=1) == query.key("h", 80, b=2, a=1)
    assert query.key("h", x={"a": 1, "b": 2}) == query.key("h", x={"b": 2, "a": 1}), "equal dicts are equal arguments"

    @cache.cached(ignore=("fields",))
    def ignoring(**fields: object) -> None: ...

    assert ignoring.key(a=1, b=2) == ignoring.key(b=2, a=1)


@pytest.mark.parametrize(("template", "argument"), [("{user.id}", 5), ("{user[0]}", 5), ("{user:>5}", object())])
def test_template_that_does_not_fit_an_argument_is_refused(cache: LRUCache, template: str, argument: object) -> None:
    @cache.cached(key=template)
    def name(user: Any) -> str:
        return str(user)

    with pytest.raises(InvalidArgument, match="a template that fits the arguments; this raised") as caught:
        name(argument)
    assert caught.value.argument == "key"
