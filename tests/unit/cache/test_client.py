"""The methods of the caches refuse invalid arguments in both APIs, before they send anything."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.codec.codec import Codec
from agentperf_redis.errors import InvalidArgument
from tests.support.refusals import assert_refused

# One invalid value per argument. The tests of the argument checks cover the other invalid values.
REFUSED: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    *[("key", method, (5,), {}) for method in ("get", "delete", "entry")],
    ("key", "put", (None, 1), {}),
    ("key", "get_or_compute", ("\ud800", int), {}),
    ("ttl", "put", ("k", 1, 0), {}),
    ("ttl", "get_or_compute", ("k", int, "5"), {}),
    *[("tags", "put", ("k", 1), {"tags": tags}) for tags in ("news", [""], 5)],
    *[("keys", "get_many", (keys,), {}) for keys in ("abc", [5])],
    ("keys", "delete_many", ("abc",), {}),
    ("values", "put_many", (["a"],), {}),
    ("tags", "invalidate_tags", ("",), {}),
    *[("value", "put", ("k", value), {}) for value in (object(), "x" * 2_000_000)],
    *[("items", "warm_up", (items, str.upper), {}) for items in ("abc", 5, ["a", 5])],
    *[("concurrency", "warm_up", (["a"], str.upper), {"concurrency": number}) for number in (0, 1000)],
    ("progress", "warm_up", (["a"], str.upper), {"progress": 5}),
    ("ttl", "warm_up", (["a"], str.upper), {"ttl": 0}),
    *[("key", method, (5,), {}) for method in ("ttl", "touch", "incr", "pop")],
    *[("key", method, (None, 1), {}) for method in ("add", "replace")],
    *[("if_version", "put", ("k", 1), {"if_version": version}) for version in (-1, True, "1", 1.0, 2**60)],
    *[("by", "incr", ("k", by), {}) for by in (2**53, -(2**53), True, 1.0, "1")],
    ("ttl", "incr", ("k",), {"ttl": 0}),
    ("create", "incr", ("k",), {"create": 1}),
    ("ttl", "touch", ("k", 0), {}),
    ("tags", "add", ("k", 1), {"tags": "news"}),
    ("value", "replace", ("k", object()), {}),
    *[("match", "scan", (), {"match": match}) for match in (5, b"*")],
    *[("batch", "scan", (), {"batch": batch}) for batch in (0, 10_001, True)],
]


@pytest.mark.parametrize(
    ("argument", "method", "args", "kwargs"), REFUSED, ids=lambda part: part if isinstance(part, str) else ""
)
def test_invalid_argument_is_refused_by_its_name(
    dead_backend: Backend, argument: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_refused(LRUCache(backend=dead_backend), argument, method, *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        *[(LRUCache, "max_size", size) for size in (-1, False, 2**53, None)],
        *[(LRUCache, "default_ttl", ttl) for ttl in (0, True)],
        (LRUCache, "name", ""),
        *[(LRUCache, "max_bytes", size) for size in (0, True)],
        (LRUCache, "policy", "lfu"),
        (LRUCache, "strict", 1),
        *[(TieredCache, argument, 0) for argument in ("hot_size", "warm_size", "cold_size", "warm_ttl")],
    ],
)
def test_invalid_setting_is_refused_by_its_name(dead_backend: Backend, kind: Any, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        kind(**{argument: value}, backend=dead_backend)
    assert refused.value.argument == argument


@pytest.mark.parametrize("kind", [LRUCache, TieredCache])
@pytest.mark.parametrize("value", ["none", None, True, 0])
def test_unknown_policy_for_outages_is_refused(dead_backend: Backend, kind: Any, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="'compute', 'raise', 'miss'") as refused:
        kind(on_unavailable=value, backend=dead_backend)
    assert refused.value.argument == "on_unavailable"


def test_incr_refuses_a_codec_with_other_integers(dead_backend: Backend) -> None:
    class Reversed(Codec):
        def encode(self, value: object) -> bytes:
            return super().encode(value)[::-1]

    assert_refused(LRUCache(backend=dead_backend, codec=Reversed()), "codec", "incr", "k")


def test_size_of_an_object_that_is_off_cannot_change(dead_backend: Backend) -> None:
    for cache, size in ((LRUCache(0, name="off", backend=dead_backend), 5), (LRUCache(5, backend=dead_backend), 0)):
        with pytest.raises(InvalidArgument, match="max_size"):
            cache.max_size = size
    off = LRUCache(0, name="off", backend=dead_backend)
    off.max_size = 0
    with pytest.raises(InvalidArgument, match="whole number"):
        off.max_size = False
    assert off.max_size == 0


def test_unknown_tier_error_lists_the_known_tiers(dead_backend: Backend) -> None:
    with pytest.raises(InvalidArgument, match="'hot', 'warm', 'cold'"):
        TieredCache(backend=dead_backend).put("k", 1, "lukewarm")
