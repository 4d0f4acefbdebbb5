"""Entries, limits, tiers and tags: values come back equal, and Redis holds the documented keys."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, Policy, Tier, TieredCache, entry_format
from agentperf_redis.cache.async_client import AsyncCache, AsyncLRUCache
from agentperf_redis.cache.commands import SCHEMA
from agentperf_redis.errors import CorruptState, InvalidArgument, SchemaMismatch, ScriptFailed
from agentperf_redis.metrics.client import MetricsCollector
from tests.support.cache_scan import faults
from tests.support.calls import Call
from tests.support.mutants import alter
from tests.support.places import DATA
from tests.support.servers import Raw, Server, wait_until
from tests.support.traces import read_trace
from tests.support.workers import Workers


def tag(namespace: str, service: str = "cache", name: str = "default") -> str:
    return f"{namespace}:{{{service}:{name}}}"


def test_value_is_stored_under_the_documented_keys(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend)

    assert call(cache, "put", "answer", 42, 60, tags=["news"]) is True

    assert call(cache, "get", "answer") == 42
    where = tag(namespace)
    entry = raw.get(f"{where}:e:answer")
    version = entry_format.version_of(entry.encode())
    assert version == entry_format.unpack_score(raw.zscore(f"{where}:cold", "answer"))[0]
    assert 0 < raw.pttl(f"{where}:e:answer") <= 60_000
    expiry, cost, fresh, tags, key_bytes, _ = entry[14:].split(" ", 5)
    assert (entry[8], int(expiry)) == ("+", raw.pexpiretime(f"{where}:e:answer"))
    assert (cost, fresh, tags, key_bytes) == ("0", "0", "news", "0")
    call(cache, "put", "plain", 7, 60)
    assert (raw.get(f"{where}:e:plain")[8], raw.get(f"{where}:e:plain")[14:]) == (".", "m\x07")
    assert raw.zscore(f"{namespace}:resources", "cache:default")
    assert faults(raw, namespace, "cache", "default") == []


def test_miss_returns_default_and_none_is_a_value(call: Call, backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    call(cache, "put", "none", None)

    assert call(cache, "get", "nothing") is None
    assert call(cache, "get", "nothing", "default") == "default"
    assert call(cache, "get", "none", "default") is None
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 2)


def test_statistics_have_the_in_memory_version_shape(call: Call, backend: Backend) -> None:
    cache = LRUCache(max_size=3, name="default", backend=backend)
    for key in "abcd":
        call(cache, "put", key, 1)
    call(cache, "get", "d")
    call(cache, "get", "a")

    assert call(cache, "get_stats") == {
        "size": 3,
        "max_size": 3,
        "hits": 1,
        "misses": 1,
        "hit_rate": "50.0%",
        "total_requests": 2,
    }
    stats = call(cache, "stats")
    assert (stats.evictions, stats.max_size, stats.hit_rate) == (1, 3, 0.5)
    assert stats.bytes > 0
    assert (cache.hits, cache.misses, len(cache), cache.max_size) == (1, 1, 3, 3)


def test_only_new_keys_evict_the_least_recently_used(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(max_size=3, name="default", backend=backend)
    for key in "abc":
        call(cache, "put", key, key)
    call(cache, "get", "a")
    call(cache, "put", "c", "new")
    assert call(cache, "keys") == ["b", "a", "c"]

    call(cache, "put", "d", "d")

    assert call(cache, "keys") == ["a", "c", "d"]
    assert call(cache, "get_many", ["a", "b", "c", "d"]) == {"a": "a", "c": "new", "d": "d"}
    assert raw.zrange(f"{tag(namespace)}:cold", 0, -1) == call(cache, "keys")
    assert cache.access_order == call(cache, "keys")


RECORDED = DATA / "calls.trace.gz"
"""9,000 accesses to 262 keys. The keys are the functions that Python's standard library called, in order, while it
parsed arguments, mail, configuration, source and XML. The trace has only every third function, and no function twice
in a row."""


@pytest.mark.thorough
@pytest.mark.parametrize("size", [8, 50])
def test_one_process_sees_a_textbook_lru(backend: Backend, raw: Raw, namespace: str, size: int) -> None:
    """Over a recorded trace, each access hits if and only if a textbook LRU hits, and the same entries are left."""
    cache, model = LRUCache(max_size=size, name="default", backend=backend), OrderedDict[str, int]()
    trace = read_trace(RECORDED)
    assert len(trace) == 9000
    hits = 0
    for step, key in enumerate(trace):
        expected = model.get(key)
        assert cache.get(key) == expected, f"step {step}"
        if expected is None:
            cache.put(key, step)
            model[key] = step
            if len(model) > size:
                model.popitem(last=False)
        else:
            hits += 1
            model.move_to_end(key)
    assert cache.keys() == list(model)
    assert cache.stats().hits == hits
    assert faults(raw, namespace, "cache", "default") == []


def test_expired_entries_leave_no_trace(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(default_ttl=0.03, name="default", backend=backend)
    call(cache, "put", "short", 1)
    call(cache, "put", "long", 2, math.inf)
    wait_until(lambda: call(cache, "get", "short") is None, "the entry to expire")

    assert call(cache, "sweep") == 1

    assert raw.hkeys(f"{tag(namespace)}:size") == ["long"]
    assert raw.pttl(f"{tag(namespace)}:e:long") == -1
    assert call(cache, "stats").expirations == 1
    assert faults(raw, namespace, "cache", "default") == []


def test_entry_returns_all_stored_facts(call: Call, backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    before = datetime.now(UTC)
    call(cache, "put", "k", [1], 60, tags=["a b", "c"])
    fresh = call(cache, "entry", "k")
    call(cache, "get", "k")

    entry = call(cache, "entry", "k")

    assert call(cache, "entry", "other") is None
    assert (entry.key, entry.value, entry.tags, entry.tier) == ("k", [1], {"a b", "c"}, Tier.COLD)
    assert (fresh.access_count, fresh.last_accessed, entry.access_count) == (0, None, 1)
    assert entry.created_at <= entry.last_accessed
    assert abs(entry.created_at - before) < timedelta(seconds=10)
    assert entry.expires_at - entry.created_at == pytest.approx(timedelta(seconds=60), abs=timedelta(milliseconds=2))
    assert not entry.is_expired()
    assert call(cache, "stats").hits == 1, "inspection does not count as a read"
    assert cache.cache == {"k": entry}


@pytest.mark.usefixtures("no_sampling")
def test_delete_clear_and_tags_make_misses(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend)
    call(cache, "put_many", {"a": 1, "b": 2, "c": 3}, tags=["all"])
    call(cache, "put", "d", 4, tags=["some", "more"])
    assert call(cache, "delete", "a") is True
    assert call(cache, "delete", "a") is False
    assert call(cache, "delete_many", ["b", "x"]) == 1
    assert call(cache, "get_many", list("abcd")) == {"c": 3, "d": 4}

    call(cache, "invalidate_tags", "all")
    assert call(cache, "get_many", ["c", "d"]) == {"d": 4}
    call(cache, "put", "c", 5, tags=["all"])
    assert call(cache, "get", "c") == 5

    call(cache, "clear")
    assert call(cache, "get_many", ["c", "d"]) == {}
    assert call(cache, "size") == 0
    assert faults(raw, namespace, "cache", "default") == []
    call(cache, "sweep")
    left = {key.removeprefix(tag(namespace) + ":") for key in raw.scan_iter(match=f"{namespace}:*default*")}
    assert left == {"meta", "epochs"}


@pytest.mark.parametrize("kind", [LRUCache, TieredCache])
def test_sweep_removes_entries_invalidated_by_tag(
    call: Call, backend: Backend, raw: Raw, namespace: str, kind: type[LRUCache | TieredCache]
) -> None:
    cache = kind(name="default", backend=backend)
    service = "cache" if kind is LRUCache else "tiered"
    for first in (0, 200, 400):
        call(cache, "put_many", {f"dead{number}": "x" for number in range(first, first + 200)}, tags=["gone", "other"])
    call(cache, "put_many", {"plain": 1, "short": 2})
    call(cache, "put_many", {"kept": 3, "again": 4}, tags=["other"])
    assert call(cache, "sweep") == 0
    call(cache, "invalidate_tags", "gone")
    call(cache, "put", "again", 5, tags=["gone"])
    assert call(cache, "size") == 604, "no entry was touched"

    assert call(cache, "sweep") == 600

    live = {"plain": 1, "short": 2, "kept": 3, "again": 5}
    assert sorted(call(cache, "keys")) == sorted(live)
    assert call(cache, "get_many", list(live)) == live
    assert not list(raw.scan_iter(match=f"{tag(namespace, service)}:e:dead*".replace("{", "[{]").replace("}", "[}]")))
    assert (call(cache, "stats").evictions, faults(raw, namespace, service, "default")) == (0, [])

    raw.delete(f"{tag(namespace, service)}:tags")
    raw.set(f"{tag(namespace, service)}:tags", "of a wrong type")
    call(cache, "sweep")
    raw.delete(f"{tag(namespace, service)}:epochs")
    raw.rpush(f"{tag(namespace, service)}:epochs", "of a wrong type")
    call(cache, "sweep")
    assert (call(cache, "size"), faults(raw, namespace, service, "default")) == (4, [])


def test_bytes_are_bounded_too(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(max_bytes=500, name="default", backend=backend)
    for number in range(20):
        assert call(cache, "put", f"k{number}", "x" * 60) is True
    assert 0 < call(cache, "stats").bytes <= 500
    assert call(cache, "get", "k19") == "x" * 60
    assert faults(raw, namespace, "cache", "default") == []

    assert call(cache, "put", "k19", "x" * 600) is False

    assert call(cache, "get", "k19") is None, "the old value was invalidated"
    assert faults(raw, namespace, "cache", "default") == []


def test_long_and_unusual_keys_stay_distinct(call: Call, backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    keys = ["", "{", "}", "a}b{c", "*?[", "\x00", "\r\n", "é", "e\u0301", "x" * 121, "x" * 122, "x" * 10_000]
    for number, key in enumerate(keys):
        call(cache, "put", key, number)
    assert call(cache, "get_many", keys) == {key: number for number, key in enumerate(keys)}


@pytest.mark.parametrize("key", ["x" * 121, "Summarize:\n" + "text " * 500, "名" * 41, "x" * 4096, "x" * 4097])
@pytest.mark.parametrize("options", [{}, {"local_size": 5}, {"strict": True}], ids=["plain", "local", "strict"])
def test_long_key_is_the_same_key_everywhere(
    call: Call, backend: Backend, raw: Raw, namespace: str, key: str, options: dict[str, Any]
) -> None:
    cache = LRUCache(name="default", backend=backend, **options)
    call(cache, "put", key, [1], tags=["t"])
    (name,) = raw.hkeys(f"{tag(namespace)}:size")
    shown = key if len(key) <= 4096 else name
    assert call(cache, "keys") == list(cache.cache) == cache.access_order == [shown]
    assert (cache.cache[shown].value, call(cache, "entry", key).key, call(cache, "entry", name).key) == (
        [1],
        key,
        shown,
    )
    for _ in range(2):  # the second round may read local copies
        assert [call(cache, "get", each) for each in (key, name)] == [[1], [1]]
        assert call(cache, "get_many", [name, key]) == {name: [1], key: [1]}
    assert faults(raw, namespace, "cache", "default") == []

    call(cache, "put", name, 2)
    assert [call(cache, "get", each) for each in (key, name)] == [2, 2]
    assert call(cache, "get_or_compute", name, int) == 2
    assert call(cache, "put_many", {name: 3, key: 4}) == 2
    assert [call(cache, "get", each) for each in (key, name)] == [4, 4]
    assert (call(cache, "size"), call(cache, "keys")) == (1, [shown])
    assert call(cache, "delete_many", [name, key]) == 1
    assert [call(cache, "get", each) for each in (key, name)] == [None, None]
    assert call(cache, "get_or_compute", key, lambda: 5) == 5
    assert call(cache, "keys") == [shown]
    call(cache, "put_many", {"first": 1, key: 5, "last": 6})
    assert call(cache, "keys") == ["first", shown, "last"]
    assert call(cache, "delete", name) is True
    assert call(cache, "get", key) is None


def test_tiers_promote_and_demote_without_new_ttl(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = TieredCache(1, 2, 3, 100, 200, 300, policy="lru", name="default", backend=backend)
    where = tag(namespace, "tiered")

    def tiers() -> dict[str, list[str]]:
        call(cache, "flush")
        return {tier: raw.zrange(f"{where}:{tier}", 0, -1) for tier in ("hot", "warm", "cold")}

    seconds, micros = raw.time()
    call(cache, "put", "a", 1)
    call(cache, "put", "b", 2, "warm")
    call(cache, "put", "c", 3, Tier.HOT)
    seconds_then, micros_then = raw.time()
    assert tiers() == {"hot": ["c"], "warm": ["b"], "cold": ["a"]}
    expiries = {key: raw.pexpiretime(f"{where}:e:{key}") for key in "abc"}
    begin_ms, end_ms = seconds * 1000 + micros // 1000, seconds_then * 1000 + micros_then // 1000 + 1
    for key, life_ms in (("a", 300_000), ("b", 200_000), ("c", 100_000)):
        assert begin_ms + life_ms <= expiries[key] <= end_ms + life_ms

    assert call(cache, "get", "a") == 1
    assert tiers() == {"hot": ["c"], "warm": ["b", "a"], "cold": []}
    assert call(cache, "get", "a") == 1
    assert tiers() == {"hot": ["a"], "warm": ["b", "c"], "cold": []}, "hot has capacity for one"
    assert {key: raw.pexpiretime(f"{where}:e:{key}") for key in "abc"} == expiries
    call(cache, "put", "b", 5)
    assert tiers()["warm"] == ["c", "b"], "an overwritten entry keeps its tier"
    assert call(cache, "entry", "a").tier is Tier.HOT
    stats = call(cache, "get_stats")
    assert [(stats[tier]["hits"], stats[tier]["misses"]) for tier in ("hot", "warm", "cold")] == [
        (0, 2),
        (1, 1),
        (1, 0),
    ]
    assert [stats[tier]["max_size"] for tier in ("hot", "warm", "cold")] == [1, 2, 3]
    assert cache.hot.get_stats() == stats["hot"]
    assert (cache.warm.hits, cache.cold.misses, cache.hot.max_size, cache.cold.default_ttl) == (1, 0, 1, 300)
    assert faults(raw, namespace, "tiered", "default") == []


def test_tinylfu_keeps_frequent_entries_through_a_scan(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    often = [f"often{number}" for number in range(15)]
    kept = {}
    for policy in Policy:
        cache = TieredCache(1, 1, 18, policy=policy, name=policy.value, backend=backend)
        for key in often:
            call(cache, "put", key, 1)
        for _ in range(4):
            call(cache, "get_many", often)
        for number in range(100):
            call(cache, "put", f"once{number}", 1)
        assert call(cache, "get", "once99") == 1, "a put is found by the next get"
        kept[policy] = len(call(cache, "get_many", often))
        assert faults(raw, namespace, "tiered", policy.value) == []
    assert kept[Policy.TINYLFU] >= 12
    assert kept[Policy.LRU] <= 2


def test_strict_reads_are_recorded_at_once(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(max_size=2, strict=True, name="default", backend=backend)
    call(cache, "put", "a", 1)
    call(cache, "put", "b", 2)

    assert call(cache, "get", "a") == 1
    assert call(cache, "get", "x", 0) == 0

    assert raw.zrange(f"{tag(namespace)}:cold", 0, -1) == ["b", "a"]
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 1)


def read_in_turn(url: str, namespace: str, max_size: int) -> Iterator[int | None]:
    """A worker process. For each request, read the key, put the step's number after a miss, and yield what was read."""
    backend = Backend(url, namespace=namespace)
    cache = LRUCache(max_size=max_size, strict=True, name="default", backend=backend)
    found: int | None = None
    while True:
        requested: tuple[str, int] | None = yield found
        if requested is None:
            break
        key, step = requested
        found = cache.get(key)
        if found is None:
            cache.put(key, step)
    backend.close()


def test_strict_processes_share_one_textbook_lru(server: Server, namespace: str, workers: Workers, raw: Raw) -> None:
    """Each process records its reads at once. So after each access, hits and order equal those of a textbook LRU."""
    size, model = 8, OrderedDict[str, int]()
    processes = [workers.start(read_in_turn, server.url, namespace, size) for _ in range(2)]
    for process in processes:
        process.said()
    hits = evicted = 0
    for step, key in enumerate(read_trace(RECORDED)[4000:4600]):
        process = processes[step % 2]
        process.answer((key, step))
        found = process.said()

        assert found == model.get(key), f"step {step}"
        if found is None:
            model[key] = step
            if len(model) > size:
                model.popitem(last=False)
                evicted += 1
        else:
            hits += 1
            model.move_to_end(key)
        assert raw.zrange(f"{tag(namespace)}:cold", 0, -1) == list(model), f"step {step}"
    for process in processes:
        process.answer(None)
        process.result()
    assert min(hits, evicted) > 50
    meta = raw.hgetall(f"{tag(namespace)}:meta")
    assert (int(meta["cold"]), int(meta["evicted"])) == (hits, evicted)
    assert faults(raw, namespace, "cache", "default") == []


def test_strict_waiter_of_another_process_counts_a_hit(
    call: Call, backend: Backend, server: Server, connect: Callable[..., Backend]
) -> None:
    """Both callers miss. One computes the value, and the other gets that value."""
    cache, remote = (
        LRUCache(strict=True, name="default", backend=backend),
        LRUCache(strict=True, name="default", backend=connect(server.url)),
    )
    begun, go_on = threading.Event(), threading.Event()

    def compute() -> int:
        begun.set()
        assert go_on.wait(10)
        return 1

    with ThreadPoolExecutor(2) as threads:
        leading = threads.submit(remote.get_or_compute, "k", compute)
        assert begun.wait(10)
        waiting = threads.submit(call, cache, "get_or_compute", "k", lambda: 2)
        where = f"{tag(backend.namespace)}:l:k"
        with contextlib.closing(server.client()) as raw:
            wait_until(lambda: raw.hexists(where, "waited"), "the other caller to wait")
        go_on.set()
        assert (leading.result(10), waiting.result(10)) == (1, 1)

    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 1)
    assert call(cache, "get", "other") is None
    call(cache, "clear")
    assert call(cache, "get", "k") is None
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 3)
    assert stats.kind == "lru"


def test_reads_are_reported_automatically(backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend)
    cache.put("a", 1)
    cache.get("a")
    wait_until(lambda: raw.hget(f"{tag(namespace)}:meta", "cold") == "1", "the read to be reported")
    cache.get("nothing")
    backend.close()
    assert raw.hget(f"{tag(namespace)}:meta", "misses") == "1", "closing reports the remaining reads"


def test_both_kinds_with_one_name_coexist(backend: Backend) -> None:
    lru, tiered = LRUCache(name="default", backend=backend), TieredCache(name="default", backend=backend)
    lru.put("k", "lru")
    tiered.put("k", "tiered")
    assert (lru.get("k"), tiered.get("k")) == ("lru", "tiered")


def test_last_settings_apply_and_local_conflicts_are_refused(
    server: Server, backend: Backend, connect: Callable[..., Backend], caplog: pytest.LogCaptureFixture
) -> None:
    cache = LRUCache(max_size=5, name="default", backend=backend)
    assert LRUCache(max_size=5, name="default", backend=backend).put("a", 1)
    with pytest.raises(InvalidArgument, match=r"max_size is 6; allowed: 5, since cache .* is open in this process"):
        LRUCache(max_size=6, name="default", backend=backend)

    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        remote = LRUCache(max_size=2, name="default", backend=connect(server.url))
        remote.put("b", 2)
    was, is_now = (f"max_size={size}, max_bytes=None, default_ttl=None, policy='lru'" for size in (5, 2))
    assert f"settings changed from {was} to {is_now}" in caplog.text
    assert repr(remote) == f"LRUCache('default', {is_now})"
    cache.put("c", 3)
    assert len(cache) == 2, "the other process's limit applies here too"
    assert cache.stats().max_size == 2

    del cache
    assert LRUCache(max_size=6, name="default", backend=backend).stats().max_size == 6, (
        "the first call deploys the settings"
    )


def test_omitted_options_keep_the_cache_settings(
    call: Call,
    server: Server,
    backend: Backend,
    connect: Callable[..., Backend],
    caplog: pytest.LogCaptureFixture,
    raw: Raw,
    namespace: str,
) -> None:
    made = LRUCache(max_size=7, default_ttl=60, max_bytes=10**6, policy="tinylfu", name="default", backend=backend)
    call(made, "put", "a", 1)
    settings = raw.hget(f"{tag(namespace, 'cache')}:meta", "settings")

    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        plain = LRUCache(name="default", backend=connect(server.url))
        call(plain, "put", "b", 1)

    assert raw.hget(f"{tag(namespace, 'cache')}:meta", "settings") == settings
    assert caplog.text == ""
    assert raw.ttl(f"{tag(namespace, 'cache')}:e:b") in range(50, 61), "the cache's default"
    call(LRUCache(max_size=9, default_ttl=600, name="default", backend=connect(server.url)), "put", "c", 1)
    assert (
        raw.hget(f"{tag(namespace, 'cache')}:meta", "settings") == "tinylfu capacity 0/0/9 bytes 1000000 ttl 0/0/600000"
    )
    call(made, "put", "d", 1)
    call(made, "put_many", {"e": 1, "f": 1})
    assert [raw.ttl(f"{tag(namespace, 'cache')}:e:{key}") in range(50, 61) for key in "def"] == [True] * 3, (
        "the object's default"
    )


def test_each_tiered_object_applies_its_own_ttls(
    call: Call, server: Server, backend: Backend, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    made = TieredCache(hot_ttl=50, cold_ttl=None, name="default", backend=backend)
    call(made, "put", "k", 1)
    call(
        TieredCache(hot_ttl=5, warm_ttl=500, cold_ttl=7, name="default", backend=connect(server.url)), "put", "other", 1
    )

    for tier, ttls in (("hot", range(40, 51)), ("warm", range(490, 501)), ("cold", (-1,)), (None, (-1,))):
        call(made, "put", f"{tier}", 1, tier)
        assert raw.ttl(f"{tag(namespace, 'tiered')}:e:{tier}") in ttls


def test_settings_of_one_process_do_not_alternate(backend: Backend) -> None:
    first = LRUCache(max_size=10, name="c", backend=backend)
    with pytest.raises(InvalidArgument, match="cache 'c' is open in this process with max_size=10"):
        LRUCache(max_size=20, name="c", backend=backend)
    second = LRUCache(max_bytes=10**6, default_ttl=5, name="c", backend=backend)
    second.put("k", 1)
    assert (first.stats().max_size, first.stats().max_bytes) == (10, 10**6)


def test_policy_change_keeps_the_entries(
    server: Server, backend: Backend, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    cache = TieredCache(5, 5, 30, policy="tinylfu", name="default", backend=backend)
    cache.put_many({f"k{number}": number for number in range(60)})
    held = cache.get_many([f"k{number}" for number in range(60)])
    cache.flush()  # reports the reads now, because a later report could move entries while `faults` scans the cache
    for policy in ("lru", "tinylfu"):
        other = TieredCache(5, 5, 30, policy=policy, name="default", backend=connect(server.url))
        other.put("one", 1, ttl=0.001)
        other.delete("one")
        assert len(other.get_many(list(held))) >= len(held) - 1
        other.flush()
        assert faults(raw, namespace, "tiered", "default") == []


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("kind", "part"),
    [(TieredCache, part) for part in ("meta", "size", "new", "hot", "warm", "cold", "ghost")]
    + [(LRUCache, part) for part in ("meta", "size", "cold")],
)
def test_wrong_key_type_is_named_without_writes(
    call: Call, backend: Backend, raw: Raw, namespace: str, kind: type[LRUCache | TieredCache], part: str
) -> None:
    cache = kind(name="default", backend=backend)
    call(cache, "put", "before", 1, ttl=60)
    poisoned = f"{tag(namespace, 'tiered' if kind is TieredCache else 'cache')}:{part}"
    raw.delete(poisoned)
    raw.set(poisoned, "poison")
    before = {key: raw.dump(key) for key in raw.scan_iter(match=f"{namespace}*")}

    for method, args in (("put", ("k", 1)), ("delete", ("k",)), ("clear", ()), ("sweep", ())):
        with pytest.raises(CorruptState) as corrupt:
            call(cache, method, *args)
        assert corrupt.value.key == poisoned

    assert {key: raw.dump(key) for key in raw.scan_iter(match=f"{namespace}*")} == before


def test_hostile_bytes_are_misses_and_reported(
    call: Call, backend: Backend, raw: Raw, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LRUCache(name="default", backend=backend)
    for number, planted in enumerate([b"", b"\x80\x04.", b"1 2 3", b"1 0 r 0  \xff", b"9" * 400 + b" 0 r 0  m\x01"]):
        raw.set(f"{tag(namespace)}:e:k{number}", planted)
        with caplog.at_level(logging.WARNING, "agentperf_redis"):
            assert call(cache, "get", f"k{number}", "default") == "default"
        assert call(cache, "get_or_compute", f"k{number}", lambda: "computed") == "computed"
        assert call(cache, "get", f"k{number}") == "computed"
    assert "counts as missing" in caplog.text
    assert call(cache, "stats").corrupt == 10


@pytest.mark.parametrize("strict", [False, True])
def test_wrongly_typed_keys_are_reported_and_replaced(
    call: Call, backend: Backend, raw: Raw, namespace: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LRUCache(name="default", backend=backend, strict=strict)
    raw.lpush(f"{tag(namespace)}:e:k", "poison")
    raw.set(f"{tag(namespace)}:l:l", "poison")
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        assert call(cache, "get", "k") is None
        for key in "kl":
            assert call(cache, "get_or_compute", key, lambda: "computed") == "computed"
            assert call(cache, "get", key) == "computed", "the computed value is stored"
    stats = call(cache, "stats")
    # a plain read cannot distinguish a wrong type from a miss; `claim.lua` and `get_strict.lua` can
    assert stats.corrupt == (4 if strict else 2)
    assert (stats.hits, stats.misses) == (2, 3)
    assert "has a wrong type" in caplog.text
    assert faults(raw, namespace, "cache", "default") == []


def test_strict_counts_a_hit_only_for_a_value(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend, strict=True)
    call(cache, "put", "of t", 1, tags=["s", "t"])
    call(cache, "put", "of u", 1, tags=["u"])
    call(cache, "put", "of none", 1)
    call(cache, "put", "garbage", 1)
    raw.set(f"{tag(namespace)}:e:garbage", "poison")
    call(cache, "invalidate_tags", "t")
    assert [call(cache, "get", key) for key in ("of t", "of u", "of none", "garbage")] == [None, 1, 1, None]
    assert call(cache, "get_or_compute", "of t", lambda: 2) == 2
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses, stats.corrupt) == (2, 3, 1)
    raw.set(f"{tag(namespace)}:epochs", "poison")
    assert call(cache, "get", "of u") is None
    assert call(cache, "stats").corrupt == 2


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_another_data_model_is_not_changed(call: Call, backend: Backend, raw: Raw, namespace: str, schema: int) -> None:
    stored = {"schema": str(schema), "settings": "of another form"}
    raw.hset(f"{tag(namespace)}:meta", mapping=stored)
    with pytest.raises(SchemaMismatch, match=f"version {schema}"):
        call(LRUCache(name="default", backend=backend), "put", "k", 1)
    assert raw.hgetall(f"{tag(namespace)}:meta") == stored


@pytest.mark.thorough
def test_lowered_limits_hold_after_the_first_call(
    call: Call, backend: Backend, connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str
) -> None:
    values = {f"k{number}": "x" * 50 for number in range(1500)}
    LRUCache(5000, name="lru", backend=backend).put_many(values)
    LRUCache(5000, name="bytes", backend=backend).put_many(values)
    tiered = TieredCache(1000, 600, 3000, name="tiers", backend=backend)
    tiered.put_many(values, "hot")
    tiered.put_many({f"w{number}": 1 for number in range(500)}, "warm")

    remote = connect(server.url)
    lru = LRUCache(10, name="lru", backend=remote)
    in_bytes = LRUCache(5000, name="bytes", max_bytes=2000, backend=remote)
    tiers = TieredCache(2, 3, 5000, name="tiers", backend=remote)
    call(lru, "delete", "none")
    call(in_bytes, "delete", "none")
    call(tiers, "delete", "none")

    assert call(lru, "keys") == [f"k{number}" for number in range(1490, 1500)], "the newest stay"
    assert 0 < call(in_bytes, "stats").bytes <= 2000
    stats = call(tiers, "stats")
    assert (stats.hot.size, stats.warm.size, stats.size) == (2, 3, 2000)
    for service, name in (("cache", "lru"), ("cache", "bytes"), ("tiered", "tiers")):
        assert faults(raw, namespace, service, name) == []


FIRST_CALLS: dict[str, tuple[Any, ...]] = {
    "add": ("k9", 1),
    "clear": (),
    "delete": ("none",),
    "delete_many": (["none"],),
    "entry": ("k9",),
    "flush": (),
    "get": ("k9",),
    "get_many": (["k9"],),
    "get_or_compute": ("k9", int),
    "get_stats": (),
    "incr": ("k9",),
    "invalidate_tags": ("none",),
    "keys": (),
    "pop": ("none",),
    "put": ("k9", 1),
    "put_many": ({"k9": 1},),
    "replace": ("k9", 1),
    "series": (),
    "size": (),
    "stats": (),
    "sweep": (),
    "touch": ("k9",),
    "ttl": ("k9",),
    "warm_up": (["k9"], len),
}


def test_first_calls_name_every_operation() -> None:
    public = {name for of in (AsyncLRUCache, AsyncCache) for name, made in vars(of).items() if inspect.isfunction(made)}
    # FIRST_CALLS leaves out `scan`, because `scan` sends nothing until its first key is taken.
    assert {name for name in public if not name.startswith("_")} == set(FIRST_CALLS) | {"scan"}


@pytest.mark.thorough
@pytest.mark.parametrize("method", FIRST_CALLS)
@pytest.mark.parametrize("options", [{}, {"local_size": 5}, {"strict": True}], ids=["plain", "local", "strict"])
def test_lowered_limit_holds_from_the_first_call(
    call: Call,
    backend: Backend,
    connect: Callable[..., Backend],
    server: Server,
    raw: Raw,
    namespace: str,
    method: str,
    options: dict[str, Any],
) -> None:
    LRUCache(10, name="default", backend=backend).put_many({f"k{number}": number for number in range(10)})
    lowered = LRUCache(3, name="default", backend=connect(server.url), **options)
    call(lowered, method, *FIRST_CALLS[method])
    assert raw.hlen(f"{tag(namespace)}:size") <= 3

    lowered.max_size = 10
    call(lowered, "put_many", {f"k{number}": number for number in range(10)})
    call(lowered, "get", "k9")
    lowered.max_size = 2
    call(lowered, method, *FIRST_CALLS[method])
    assert raw.hlen(f"{tag(namespace)}:size") <= 2, "the same for an assigned limit, also with local copies"


def test_reads_go_on_when_settings_cannot_be_stored(
    call: Call, backend: Backend, connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str
) -> None:
    LRUCache(name="default", backend=backend).put("k", 1)
    raw.delete(f"{tag(namespace)}:ghost")
    raw.set(f"{tag(namespace)}:ghost", "poison")
    lowered = LRUCache(3, name="default", backend=connect(server.url))
    assert (call(lowered, "get", "k"), call(lowered, "get_many", ["k"])) == (1, {"k": 1})
    with pytest.raises(CorruptState):
        call(lowered, "put", "k", 2)


def test_empty_caches_are_true_without_io() -> None:
    backend = Backend("redis://127.0.0.1:1", deadline=0.1)
    try:
        assert LRUCache(name="default", backend=backend)
        assert TieredCache(name="default", backend=backend)
    finally:
        backend.close()


def test_assigned_max_size_applies_to_every_process(
    backend: Backend, connect: Callable[..., Backend], server: Server
) -> None:
    cache, elsewhere = (
        LRUCache(3, name="default", backend=backend),
        LRUCache(name="default", backend=connect(server.url)),
    )
    cache.put_many({str(number): number for number in range(5)})
    assert len(cache) == 3
    cache.max_size = 10
    cache.put_many({str(number): number for number in range(8)})
    assert (len(cache), cache.max_size) == (8, 10)
    elsewhere.put_many({str(number): number for number in range(20)})
    assert len(elsewhere) == 10, "the limit applies to all processes"
    cache.max_size = 2
    cache.put("last", 1)
    assert len(cache) == 2
    with pytest.raises(InvalidArgument, match="max_size is 0"):
        cache.max_size = 0
    assert cache.max_size == 2


def test_assigned_default_ttl_applies_to_later_puts(backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend)
    cache.put("before", 1)
    cache.default_ttl = 60
    cache.put("after", 1)
    cache.default_ttl = None
    cache.put("again", 1)
    with pytest.raises(InvalidArgument, match="default_ttl is -1"):
        cache.default_ttl = -1
    ttls = {key: raw.pttl(f"{namespace}:{{cache:default}}:e:{key}") for key in ("before", "after", "again")}
    assert ttls["before"] == ttls["again"] == -1
    assert 55_000 < ttls["after"] <= 60_000


def test_tier_views_and_start_times_refuse_assignment(backend: Backend) -> None:
    with pytest.raises(AttributeError, match="give hot_size= to the TieredCache"):
        TieredCache(name="default", backend=backend).hot.max_size = 5
    with pytest.raises(AttributeError):
        MetricsCollector(backend=backend).start_time = None  # type: ignore[misc, assignment]


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("policy", Policy)
def test_usual_put_keeps_its_state_in_64_fields(
    policy: Policy, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more fields, each put would grow a table of Lua to 128 fields, which takes 6 % of its time."""
    count = (
        "local fields = 0 for _ in pairs(I) do fields = fields + 1 end return redis.error_reply('FIELDS ' .. fields)"
    )
    alter(monkeypatch, "cache/put", "return {1, version, I.evicted}", count)
    cache = LRUCache(2, name="default", policy=policy, backend=backend)
    found = []
    for key in "abc":  # the last put evicts
        with pytest.raises(ScriptFailed, match="FIELDS") as failed:
            cache.put(key, 1)
        found.append(int(re.findall(r"FIELDS (\d+)", str(failed.value))[0]))
    assert max(found) <= 64
