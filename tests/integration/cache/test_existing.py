"""A cache accessed by its name alone: every operation uses the cache's stored settings and leaves them unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.cache.commands import SCHEMA
from agentperf_redis.cache.flows import ranking
from agentperf_redis.cache.operator import ExistingCache, Opaque, find, find_all
from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import CorruptState, InvalidArgument, SchemaMismatch
from tests.support.servers import Raw, Server


@dataclass
class Page:
    title: str


@pytest.fixture
def operator(server: Server, connect: Callable[..., Backend]) -> Backend:
    """A backend in the role of another process."""
    return connect(server.url)


@pytest.fixture
def cache(backend: Backend, raw: Raw, namespace: str) -> Iterator[LRUCache]:
    """The cache of a program. The test must leave the settings of the cache unchanged."""
    made = LRUCache(3, 60.0, name="answers", backend=backend)
    made.put("a", 1, tags=["odd"])
    made.put("b", 2)
    where = keys.cache(namespace, "cache", "answers")
    before = raw.hget(where.meta, "settings")
    yield made
    assert raw.hget(where.meta, "settings") == before == "lru capacity 0/0/3 bytes 0 ttl 0/0/60000"


def found(operator: Backend, service: str = "cache") -> ExistingCache:
    cache = operator.run(find(operator, service, "answers"))
    assert cache is not None
    return cache


def test_operations_use_the_stored_settings(cache: LRUCache, operator: Backend, backend: Backend) -> None:
    existing = found(operator)
    assert existing.settings.capacities == (0, 0, 3)
    assert operator.run(existing.keys()) == ["a", "b"]
    assert operator.run(existing.keys(1)) == ["a"]
    entry = operator.run(existing.entry("a"))
    assert entry is not None
    assert (entry.value, entry.tags, entry.access_count) == (1, frozenset({"odd"}), 0)
    operator.run(existing.invalidate_tags(["odd"]))
    assert cache.get_many(["a", "b"]) == {"b": 2}
    assert operator.run(existing.delete_many(["b", "z"])) == 1
    assert cache.get("b") is None
    cache.put("c", 3)
    assert operator.run(existing.clear()) == 2  # counts `c` and the invalidated `a`, which is still stored
    assert cache.get("c") is None
    stats = operator.run(existing.stats())
    assert stats is not None
    assert (stats.size, stats.max_size) == (0, 3)
    for number in range(5):
        cache.put(str(number), number)
    assert cache.size() == 3
    TieredCache(name="answers", backend=backend).put("a", 1)
    assert [(each.service, each.name) for each in operator.run(find_all(operator))] == [
        ("cache", "answers"),
        ("tiered", "answers"),
    ]


def test_deletion_refuses_a_value_being_computed(cache: LRUCache, operator: Backend) -> None:
    existing = found(operator)

    def compute() -> int:
        operator.run(existing.delete_many(["c"]))
        return 3

    assert cache.get_or_compute("c", compute) == 3
    assert cache.get("c") is None


def test_value_of_an_unknown_class_is_opaque(cache: LRUCache, operator: Backend, backend: Backend) -> None:
    registry = Registry()
    registry.add(Page)
    LRUCache(3, 60.0, name="answers", backend=backend, codec=Codec(registry=registry)).put("page", Page("Agents"))
    entry = operator.run(found(operator).entry("page"))
    assert entry is not None
    assert isinstance(entry.value, Opaque)
    assert "Page" in entry.value.reason
    assert entry.size_bytes > 0
    assert operator.run(found(operator).entry("nothing")) is None


def test_missing_cache_is_none_and_is_not_created(cache: LRUCache, operator: Backend, raw: Raw, namespace: str) -> None:
    existing = found(operator)
    assert operator.run(find(operator, "tiered", "answers")) is None
    where = keys.cache(namespace, "cache", "answers")
    settings = raw.hgetall(where.meta)
    raw.delete(where.meta)
    assert operator.run(existing.delete_many(["a"])) is None
    assert operator.run(existing.stats()) is None
    assert operator.run(find_all(operator)) == []
    assert not raw.exists(where.meta)
    raw.hset(where.meta, mapping=settings)


def test_foreign_data_is_refused(cache: LRUCache, operator: Backend, raw: Raw, namespace: str) -> None:
    where = keys.cache(namespace, "cache", "answers")
    for schema in (SCHEMA - 1, SCHEMA + 1):
        raw.hset(where.meta, "schema", schema)
        with pytest.raises(SchemaMismatch, match=f"version {schema}"):
            found(operator)
    raw.hset(where.meta, mapping={"schema": SCHEMA, "settings": "other"})
    with pytest.raises(CorruptState):
        found(operator)
    raw.hset(where.meta, "settings", "lru capacity 0/0/3 bytes 0 ttl 0/0/60000")
    bad: Any = "odd"
    with pytest.raises(InvalidArgument, match="tags"):
        operator.run(found(operator).invalidate_tags(bad))


def test_all_caches_are_listed_in_both_apis(perf: AgentPerf, runner: asyncio.Runner) -> None:
    assert perf.caches() == runner.run(perf.acaches()) == []
    perf.cache("answers", max_size=7).put("a", 1)
    perf.tiered_cache("answers").put("a", 1)
    found = perf.caches()
    assert [(each.name, each.kind, each.size) for each in found] == [("answers", "lru", 1), ("answers", "tiered", 1)]
    assert runner.run(perf.acaches()) == found


@pytest.fixture
def doomed(backend: Backend, operator: Backend) -> tuple[LRUCache, ExistingCache]:
    """A program's cache with 300 entries, and an operator's access to this cache. One sweep frees only 256 values."""
    made = LRUCache(1000, name="doomed", backend=backend)
    made.put_many({f"k{number}": number for number in range(300)})
    existing = operator.run(find(operator, "cache", "doomed"))
    assert existing is not None
    return made, existing


@pytest.mark.usefixtures("no_sampling")
def test_drop_leaves_no_key_but_the_epochs(
    doomed: tuple[LRUCache, ExistingCache], operator: Backend, raw: Raw, namespace: str
) -> None:
    _, existing = doomed
    assert operator.run(existing.drop()) == 300
    where = keys.cache(namespace, "cache", "doomed")
    assert list(raw.scan_iter(f"{where.tag}:*")) == [where.epochs]
    assert 0 < raw.pttl(where.epochs) <= 86_400_000
    assert "cache:doomed" not in raw.zrange(keys.resources(namespace), 0, -1)
    assert operator.run(find(operator, "cache", "doomed")) is None
    assert operator.run(find_all(operator)) == []


def test_program_creates_a_dropped_cache_again(
    doomed: tuple[LRUCache, ExistingCache], operator: Backend, raw: Raw, namespace: str
) -> None:
    cache, existing = doomed
    operator.run(existing.drop())
    assert cache.get("k1") is None
    assert cache.put("k1", 1)
    assert cache.get("k1") == 1
    assert "cache:doomed" in raw.zrange(keys.resources(namespace), 0, -1)
    (again,) = operator.run(find_all(operator))
    assert again.settings.capacities == (0, 0, 1000)


def test_value_computed_during_a_drop_is_not_stored(doomed: tuple[LRUCache, ExistingCache], operator: Backend) -> None:
    cache, existing = doomed

    def compute() -> str:
        assert operator.run(existing.drop()) == 300
        return "computed before the drop"

    assert cache.get_or_compute("new", compute) == "computed before the drop"
    assert cache.get("new") is None


def test_used_cache_is_only_cleared(
    doomed: tuple[LRUCache, ExistingCache], operator: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, existing = doomed
    free = ExistingCache._free_cleared

    def store_meanwhile(self: ExistingCache) -> Any:
        yield from free(self)
        cache.put("busy", 1)

    monkeypatch.setattr(ExistingCache, "_free_cleared", store_meanwhile)
    assert operator.run(existing.drop()) is None
    assert cache.get("busy") == 1
    assert cache.get("k1") is None


def test_drop_waits_for_puts_in_doubt(
    doomed: tuple[LRUCache, ExistingCache], operator: Backend, raw: Raw, namespace: str
) -> None:
    where = keys.cache(namespace, "cache", "doomed")
    raw.zadd(where.resent, {"request": 4e12})
    assert operator.run(doomed[1].drop()) is None
    raw.zadd(where.resent, {"request": 1})
    assert operator.run(doomed[1].drop()) == 0


def test_last_use_is_that_of_a_stored_entry(doomed: tuple[LRUCache, ExistingCache], operator: Backend) -> None:
    cache, existing = doomed
    stored = operator.run(existing.last_used())
    cache.get("k1")
    cache.flush()
    read = operator.run(existing.last_used())
    assert stored is not None
    assert read is not None
    assert stored < read
    cache.clear()
    assert operator.run(existing.last_used()) is None


def test_ranking_of_all_entries_keeps_no_tags(
    cache: LRUCache, operator: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a ranking must not grow with the number of entries, because that number has no bound."""
    built: list[object] = []
    monkeypatch.setattr(ranking, "TagUse", lambda *facts: built.append(facts))
    found = operator.run(find(operator, "cache", "answers"))
    assert found is not None
    best = operator.run(found.top(5))[ranking.EntryRanking.SIZE]
    assert {entry.name: sorted(entry.tags) for entry in best} == {"a": ["odd"], "b": []}
    assert built == []
