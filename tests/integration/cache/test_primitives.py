"""Tests of add, replace, incr, touch, pop, ttl, put(if_version=), put_many and scan in both APIs and both caches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import NoInteger
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.errors import BackendFull, BackendUnavailable, InvalidArgument
from tests.support.cache_scan import faults
from tests.support.caches import copied
from tests.support.calls import Call
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until

KINDS = [LRUCache, TieredCache]


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, backend: Backend) -> Any:
    return request.param(name="c", backend=backend)


def sound(cache: Any, raw: Raw, namespace: str) -> None:
    assert faults(raw, namespace, cache._service, "c") == []


def test_add_stores_only_missing_keys(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    assert call(cache, "add", "k", None, ttl=60, tags=["t"]) is True
    assert call(cache, "add", "k", 2) is False
    assert call(cache, "get", "k", "nothing") is None, "a stored None is a value"
    entry = call(cache, "entry", "k")
    assert (entry.tags, entry.ttl) == ({"t"}, pytest.approx(60, abs=30))
    for forget in (("delete", "k"), ("clear",), ("invalidate_tags", "t")):
        call(cache, *forget)
        assert call(cache, "add", "k", 3, tags=["t"]) is True
        assert call(cache, "get", "k") == 3
    sound(cache, raw, namespace)


def test_replace_stores_only_known_keys(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    assert call(cache, "replace", "k", 1) is False
    assert call(cache, "get", "k") is None
    call(cache, "put", "k", 1, tags=["t"])
    assert call(cache, "replace", "k", 2, ttl=60) is True
    entry = call(cache, "entry", "k")
    assert (entry.value, entry.tags, entry.ttl) == (2, frozenset(), pytest.approx(60, abs=30))
    sound(cache, raw, namespace)


def test_tier_of_a_new_entry_can_be_chosen(call: Call, backend: Backend) -> None:
    cache = TieredCache(name="c", backend=backend)
    call(cache, "add", "k", 1, "hot")
    assert call(cache, "entry", "k").tier.value == "hot"
    call(cache, "replace", "k", 1, "warm", ttl=5)
    assert call(cache, "entry", "k").tier.value == "warm"
    call(cache, "touch", "k")
    entry = call(cache, "entry", "k")
    assert (entry.tier.value, entry.ttl) == ("warm", pytest.approx(1800, abs=60)), "the default TTL of the tier"


def test_incr_counts_and_keeps_ttl_and_tags(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    assert call(cache, "incr", "k", ttl=60, tags=["t"]) == 1
    assert call(cache, "incr", "k", 300) == 301
    call(cache, "get", "k")
    assert call(cache, "incr", "k", -302, ttl=600) == -1
    entry = call(cache, "entry", "k")
    assert (entry.value, entry.tags, entry.access_count) == (-1, {"t"}, 1)
    assert entry.ttl == pytest.approx(60, abs=30)
    call(cache, "invalidate_tags", "t")
    assert call(cache, "incr", "k", 5) == 5, "an invalidated counter starts again"
    call(cache, "put", "k", "text")
    with pytest.raises(NoInteger, match="'k' must hold an integer") as refused:
        call(cache, "incr", "k")
    assert refused.value.key == "k"
    assert call(cache, "get", "k") == "text"
    sound(cache, raw, namespace)


def test_incr_without_create_starts_no_counter(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    for gone in ("never stored", "expired", "invalidated"):
        call(cache, "put", "expired", 1, ttl=0.001)
        call(cache, "put", "invalidated", 1, tags=["t"])
        call(cache, "invalidate_tags", "t")
        wait_until(lambda: call(cache, "get", "expired") is None, "the expiry")
        with pytest.raises(NoInteger, match="there is no value"):
            call(cache, "incr", gone, create=False)
        assert call(cache, "get", gone) is None
    call(cache, "put", "n", 41, ttl=600)
    assert call(cache, "incr", "n", create=False) == 42
    assert call(cache, "ttl", "n") == pytest.approx(600, abs=60)
    sound(cache, raw, namespace)


def test_incr_refuses_a_number_that_does_not_fit(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="c", backend=backend, max_bytes=12)
    assert call(cache, "incr", "k", 127) == 127
    with pytest.raises(InvalidArgument, match="max_bytes"):
        call(cache, "incr", "k", 2**50)
    assert call(cache, "get", "k") == 127
    sound(cache, raw, namespace)


def test_touch_sets_the_ttl_and_resurrects_nothing(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    assert call(cache, "touch", "k", 60) is False
    call(cache, "put", "k", [1], ttl=5, tags=["t"])
    version = call(cache, "entry", "k").version
    assert call(cache, "touch", "k", 600) is True
    assert call(cache, "ttl", "k") == pytest.approx(600, abs=60)
    assert call(cache, "touch", "k", math.inf) is True
    assert call(cache, "ttl", "k") == math.inf
    assert call(cache, "touch", "k", 0.001) is True
    wait_until(lambda: call(cache, "ttl", "k") is None, "the expiry")
    assert call(cache, "touch", "k", 60) is False
    call(cache, "put", "k", [1], tags=["t"])
    assert call(cache, "entry", "k").version > version
    call(cache, "invalidate_tags", "t")
    assert call(cache, "touch", "k", 60) is False
    assert call(cache, "get", "k") is None
    sound(cache, raw, namespace)


def test_pop_returns_and_removes_a_value(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    call(cache, "put", "k", {"a": 1}, tags=["t"])
    assert call(cache, "pop", "k") == {"a": 1}
    assert call(cache, "pop", "k", "nothing") == "nothing"
    assert call(cache, "size") == 0
    call(cache, "put", "k", 1, tags=["t"])
    call(cache, "invalidate_tags", "t")
    assert call(cache, "pop", "k") is None
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 2), "a pop counts as a read"
    sound(cache, raw, namespace)


def test_long_keys_work_with_every_operation(call: Call, cache: Any, raw: Raw, namespace: str) -> None:
    key, very_long = "key " * 60, "key " * 2000
    for each in (key, very_long):
        assert call(cache, "add", each, 1, ttl=60) is True
        assert call(cache, "incr", each) == 2
        assert call(cache, "touch", each, 600) is True
        entry = call(cache, "entry", each)
        assert (entry.key, entry.value) == (each, 2)
        assert call(cache, "put", each, 5, ttl=60, if_version=entry.version) is True
        assert call(cache, "ttl", each) == pytest.approx(60, abs=30)
        sound(cache, raw, namespace)
    assert key in set(cache.scan())
    assert [call(cache, "pop", each) for each in (key, very_long)] == [5, 5]
    sound(cache, raw, namespace)


def test_put_if_version_stores_over_that_version_only(call: Call, cache: Any) -> None:
    assert call(cache, "put", "k", 1, if_version=5) is False
    assert call(cache, "put", "k", 1, if_version=0) is True
    assert call(cache, "put", "k", 2, if_version=0) is False
    version = call(cache, "entry", "k").version
    assert call(cache, "touch", "k", 60) is True
    assert call(cache, "put", "k", 2, if_version=version) is True, "touch keeps the version"
    assert call(cache, "put", "k", 3, if_version=version) is False
    assert call(cache, "get", "k") == 2
    version = call(cache, "entry", "k").version
    call(cache, "delete", "k")
    assert call(cache, "put", "k", 3, if_version=version) is False
    assert call(cache, "put", "k", 4, if_version=0) is True


def test_put_many_names_the_refused_keys(call: Call, backend: Backend) -> None:
    cache = LRUCache(name="c", backend=backend, max_bytes=500)
    stored = call(cache, "put_many", {"a": 1, "large": "x" * 600, "b": 2})
    assert (stored, stored.refused) == (2, ("large",))
    assert call(cache, "put_many", {"large": "x" * 600}).refused == ("large",)
    assert call(cache, "put_many", {}).refused == ()


def test_scan_finds_every_key_in_bounded_pages(call: Call, cache: Any, runner: asyncio.Runner) -> None:
    expected = {f"k{number}" for number in range(700)} | {"long " * 60}
    call(cache, "put_many", dict.fromkeys(expected, 1))

    async def scan(**options: Any) -> list[str]:
        return [key async for key in cache.aio.scan(**options)]

    def scanned(**options: Any) -> list[str]:
        return runner.run(scan(**options)) if call.is_async else list(cache.scan(**options))

    kept = set(cache.keys())
    assert set(scanned()) == set(scanned(batch=7)) == kept
    assert set(scanned(match="k?")) == kept & {f"k{number}" for number in range(10)}
    assert scanned(match="nothing*") == []


def test_scan_of_an_unused_cache_is_empty(cache: Any) -> None:
    assert list(cache.scan()) == []


CHANGES: list[tuple[str, tuple[Any, ...], Any]] = [
    ("incr", ("k",), 8),
    ("replace", ("k", "new"), "new"),
    ("pop", ("k",), None),
    ("touch", ("k", 0.001), None),
]


@pytest.mark.parametrize(("method", "args", "after"), CHANGES, ids=lambda part: part if isinstance(part, str) else "")
def test_local_copies_follow_each_change(
    call: Call, server: Server, connect: Callable[..., Backend], method: str, args: tuple[Any, ...], after: Any
) -> None:
    reader = LRUCache(name="c", backend=connect(server.url), local_size=10)
    writer = LRUCache(name="c", backend=connect(server.url), local_size=10)
    writer.put("k", 7)
    copied(reader, "k")
    copied(writer, "k")
    call(writer, method, *args)
    if method != "touch":
        assert call(writer, "get", "k") == after, "a writer never reads its own older value"
    wait_until(lambda: reader.get("k") == after, "the change")


def test_conditions_hold_on_a_full_cache(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(3, name="c", backend=backend)
    for number in range(10):
        assert call(cache, "add", f"k{number}", number) is True
        assert call(cache, "add", f"k{number}", number) is False
        assert call(cache, "incr", f"k{number}") == number + 1
        assert call(cache, "touch", f"k{number}", 60) is True
    assert call(cache, "size") == 3
    assert call(cache, "stats").evictions == 7
    sound(cache, raw, namespace)


@pytest.mark.standalone
def test_full_server_refuses_and_changes_nothing(
    call: Call, own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    cache = LRUCache(name="c", backend=connect(own_server.url))
    call(cache, "put", "k", 1)
    with own_server.client() as raw:
        raw.config_set("maxmemory", 1)
        for method, args in (("add", ("new", 1)), ("replace", ("k", 2)), ("incr", ("k",)), ("touch", ("k", 60))):
            with pytest.raises(BackendFull):
                call(cache, method, *args)
        assert call(cache, "add", "k", 2) is False, "a refusal needs no memory"
        assert call(cache, "ttl", "k") == math.inf
        assert call(cache, "pop", "k") == 1, "a pop frees memory"
        raw.config_set("maxmemory", 0)
        assert call(cache, "add", "new", 1) is True
        assert faults(raw, namespace, "cache", "c") == []


def test_misses_end_with_the_outage(call: Call, server: Server, proxy: Proxy, connect: Callable[..., Backend]) -> None:
    steady = LRUCache(name="c", backend=connect(server.url))  # default deadline, because a put may take over 0.3 s
    call(steady, "put_many", {"kept": 1, "deleted": 1})
    cache = LRUCache(name="c", backend=connect(proxy.url, deadline=0.3), on_unavailable="miss")
    wait_until(lambda: call(cache, "get", "kept") == 1, "the server to be found")
    proxy.close_port()
    assert call(cache, "get", "kept") is None
    assert call(cache, "put", "new", 1) is False
    assert call(cache, "delete", "deleted") is False
    with pytest.raises(BackendUnavailable):
        call(cache, "incr", "n")
    proxy.open_port()
    wait_until(lambda: call(cache, "get", "kept") == 1, "the server to be found again")
    assert call(steady, "get", "deleted") is None, "the deletion was sent before the next read"


def test_object_that_is_off_leaves_the_cache_of_others(
    call: Call, backend: Backend, server: Server, connect: Any
) -> None:
    on = LRUCache(5, name="c", backend=backend)
    off = LRUCache(0, name="c", backend=connect(server.url))
    call(on, "put", "a", 1)
    call(on, "put", "b", 2)
    assert call(off, "get", "a") is None
    assert call(off, "delete", "a") is True, "an invalidation is sent"
    assert call(off, "pop", "b", "nothing") == "nothing"
    assert call(on, "get_many", ["a", "b"]) == {}
    assert call(on, "stats").max_size == 5
