"""Programs that did not use a cache while its number of shards changed, or whose replies were lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.flows import settings
from agentperf_redis.cache.flows.layouts import move
from agentperf_redis.cache.flows.resharding import Resharding
from agentperf_redis.cache.operator import find
from agentperf_redis.command import Batch, Command, Flow
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


def test_scan_during_a_change_finds_all_keys(server: Server, connect: Callable[..., Backend]) -> None:
    operator, names = connect(server.url), [f"key {number}" for number in range(600)]
    cache = LRUCache(4000, name="answers", backend=operator, shards=4)
    cache.put_many(dict.fromkeys(names, 1))
    scan = cache.scan(batch=10)
    found = {next(scan) for _ in range(400)}  # all keys of the first two shards, and some of the third
    reshard(operator, "answers", 2)
    assert found | set(scan) == set(names)


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
            raw.delete(key)  # as if the keys had expired, a day after the change
    monkeypatch.setattr(settings, "_LAYOUT_SEEN_S", 0.0)
    if invalidate == "clear":
        idle.clear()
    else:
        idle.invalidate_tags("t")
    assert LRUCache(name="answers", backend=connect(server.url)).get("k") is None
    for where in keys.cache_shards(namespace, "cache", "answers", 2):
        assert not raw.exists(where.epochs)


def _one(step: Any) -> Flow[Any]:
    return (yield step)


def resent(command: Any) -> Any:
    assert isinstance(command, Command)
    assert isinstance(command.args, dict)
    return replace(command, args={**command.args, **(command.resend_args or {})})


def lose_reply(backend: Backend, flow: Flow[Any], script: str, change: Callable[[], None]) -> Any:
    """Run a flow. The reply to its first call of `script` is lost, and `change` runs before the request is repeated."""
    lost = False
    step = next(flow)
    while True:
        commands = step.commands if isinstance(step, Batch) else (step,)
        if not lost and any(getattr(getattr(each, "script", None), "name", "") == script for each in commands):
            lost = True
            backend.run(_one(step))
            change()
            step = replace(step, commands=tuple(map(resent, commands))) if isinstance(step, Batch) else resent(step)
        try:
            step = flow.send(backend.run(_one(step)))
        except StopIteration as end:
            assert lost
            return end.value


Use = Callable[[LRUCache], Flow[Any]]
USES: dict[str, tuple[str, Use, object, object]] = {
    "pop": ("cache/pop", lambda cache: cache._flows.eraser.pop("k", None), 1, None),
    "incr": ("cache/put", lambda cache: cache._flows.writer.increment("k", 1, None, (), True), 2, 102),
    "add": ("cache/put", lambda cache: cache._flows.writer.put_in_mode("add", "n", 1, None, ()), True, 2),
    "put": ("cache/put", lambda cache: cache._flows.writer.put("k", 5, None, ()), False, None),
    "put_many": ("cache/put", lambda cache: cache._flows.writer.put_many({"k": 5}, None, ()), 0, None),
    "put alone": ("cache/put", lambda cache: cache._flows.writer.put("k", 5, None, ()), True, 5),
    "put_many alone": ("cache/put", lambda cache: cache._flows.writer.put_many({"k": 5}, None, ()), 1, 5),
}


@pytest.mark.parametrize("use", USES)
def test_request_repeated_after_a_change_has_one_effect(
    server: Server, connect: Callable[..., Backend], use: str
) -> None:
    """Another process changes the value between the lost reply and the repeated request."""
    operator, other = connect(server.url), LRUCache(name="answers", backend=connect(server.url))
    cache = LRUCache(4000, name="answers", backend=operator)
    cache.put("k", 1)
    script, flow, result, found = USES[use]

    def change() -> None:
        reshard(connect(server.url), "answers", 4)
        match use:
            case "incr":
                assert other.incr("k", 100) == 102
            case "add":
                other.put("n", 2)
            case "put" | "put_many":
                assert other.get("k") == 5
                other.put("k", 6)

    assert lose_reply(operator, flow(cache), script, change) == result
    assert other.get("n" if use == "add" else "k") == found


def test_late_move_keeps_changed_limits(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    """A second command still reads old pages after the first command has ended the change."""
    operator, late = connect(server.url), Resharding(connect(server.url), "cache", "answers", 2)
    cache = LRUCache(4000, name="answers", backend=operator)
    cache.put("k", 1)
    operator.run(late.begin())
    reshard(operator, "answers", 2)
    cache.max_size = 2000
    cache.put("l", 1)
    assert late._settings is not None
    operator.run(move(late._settings, late._new, late._old, ["k"]))
    for where in keys.cache_shards(namespace, "cache", "answers", 2, 1):
        assert "capacity 0/0/1000 " in raw.hget(where.meta, "settings")


def test_change_reaches_all_new_shards_before_it_begins(
    server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    """Otherwise, a node that has no part of the cache yet and does not answer would stop the cache."""
    operator = connect(server.url)
    LRUCache(4000, name="answers", backend=operator).put("k", 1)
    flow, reached = Resharding(operator, "cache", "answers", 4).begin(), set()
    step: Any = next(flow)
    while getattr(getattr(step, "script", None), "name", "") != "cache/relayout":
        reached |= {each.keys[0] for each in (step.commands if isinstance(step, Batch) else (step,))}
        step = flow.send(operator.run(_one(step)))
    assert reached >= {where.meta for where in keys.cache_shards(namespace, "cache", "answers", 4, 1)}
