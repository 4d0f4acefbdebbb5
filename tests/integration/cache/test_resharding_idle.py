"""Programs that did not use a cache while its number of shards changed, or whose replies were lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.flows import settings
from agentperf_redis.cache.flows.resharding import Resharding
from agentperf_redis.cache.operator import find
from tests.support.servers import Raw, Server

pytestmark = pytest.mark.servers("valkey")


def reshard(backend: Backend, name: str, shards: int) -> None:
    change = Resharding(backend, "cache", name, shards)
    state = backend.run(change.begin())
    while state is not None and not state.done:
        state = backend.run(change.step())


def test_reader_of_a_dropped_cache_finds_nothing(server: Server, connect: Callable[..., Backend]) -> None:
    operator = connect(server.url)
    cache = LRUCache(4000, name="answers", backend=operator)
    cache.put("k", 1)
    readers = [LRUCache(name="answers", backend=connect(server.url)) for _ in range(4)]
    for reader in readers:
        assert reader.get("k") == 1
        reader.flush()
    reshard(operator, "answers", 4)
    found = operator.run(find(operator, "cache", "answers"))
    assert found is not None
    operator.run(found.drop())
    assert readers[0].get("k") is None
    assert readers[1].get_many(["k"]) == {}
    assert readers[2].ttl("k") is None
    assert readers[3].entry("k") is None


@pytest.mark.parametrize("shards", [1, 2])
def test_whole_cache_reads_find_the_new_layout(server: Server, connect: Callable[..., Backend], shards: int) -> None:
    operator, idle = connect(server.url), LRUCache(name="answers", backend=connect(server.url))
    cache = LRUCache(4000, name="answers", backend=operator, shards=shards)
    cache.put("k", 1)
    assert idle.get("k") == 1
    idle.flush()
    reshard(operator, "answers", 4)
    assert idle.size() == 1
    idle = LRUCache(name="answers", backend=connect(server.url))
    assert idle.get("k") == 1
    idle.flush()
    reshard(operator, "answers", 8)
    assert idle.keys() == ["k"]
    idle.flush()
    reshard(operator, "answers", 2)
    assert list(idle.scan()) == ["k"]


@pytest.mark.parametrize("invalidate", ["clear", "tag"])
def test_invalidation_reaches_the_new_layout_after_days(
    server: Server,
    connect: Callable[..., Backend],
    raw: Raw,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    invalidate: str,
) -> None:
    operator, idle = connect(server.url), LRUCache(name="answers", backend=connect(server.url))
    cache = LRUCache(4000, name="answers", backend=operator, shards=2)
    cache.put("k", 1, tags=["t"])
    assert idle.get("k") == 1
    idle.put("l", 1)
    idle.flush()
    reshard(operator, "answers", 4)
    for where in keys.cache_shards(namespace, "cache", "answers", 2):
        for key in (where.meta, where.epochs, where.tags):
            raw.delete(key)  # as after a day
    monkeypatch.setattr(settings, "_LAYOUT_SEEN_S", 0.0)
    if invalidate == "clear":
        idle.clear()
    else:
        idle.invalidate_tags("t")
    assert LRUCache(name="answers", backend=connect(server.url)).get("k") is None
    for where in keys.cache_shards(namespace, "cache", "answers", 2):
        assert not raw.exists(where.epochs)
