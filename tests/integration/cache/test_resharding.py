"""The number of shards of a cache changes while programs use the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, commands
from agentperf_redis.cache.flows.layouts import exchange, move, pull
from agentperf_redis.cache.flows.resharding import Progress, Resharding
from agentperf_redis.cache.model import Settings
from agentperf_redis.cache.operator import find
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument
from tests.support.cache_scan import faults
from tests.support.caches import copied
from tests.support.commandline import Run, document
from tests.support.mutants import alter
from tests.support.servers import Raw, Server, wait_until

NAMES = [f"key {number}" for number in range(300)]
VALUES = {name: number for number, name in enumerate(NAMES)}


def finish(backend: Backend, shards: int, service: str = "cache", steps: int = 10_000) -> Progress:
    change = Resharding(backend, service, "answers", shards)
    state = backend.run(change.begin())
    assert state is not None
    while not state.done and steps:
        state, steps = backend.run(change.step()), steps - 1
    return state


def lru(backend: Backend, shards: int | None = None, max_size: int = 8000, **options: Any) -> LRUCache:
    return LRUCache(max_size, name="answers", backend=backend, shards=shards, **options)


@pytest.mark.parametrize("kind", [pytest.param("lru", marks=pytest.mark.thorough), "tiered"])
def test_entries_survive_changes_of_the_number(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str, kind: str
) -> None:
    operator, service = connect(server.url), "cache" if kind == "lru" else "tiered"
    cache: LRUCache | TieredCache
    if kind == "lru":
        cache = lru(connect(server.url))
    else:
        cache = TieredCache(400, 600, 7000, name="answers", backend=connect(server.url))
    cache.put_many(VALUES, ttl=600, tags=["all"])
    cache.get(NAMES[5])
    before = cache.entry(NAMES[5])
    assert before is not None
    for shards in (16, 4, 1):
        assert finish(operator, shards, service).done
        assert cache.get_many(NAMES) == VALUES
        cache.flush()  # reports the reads now, because a later report could move entries while `faults` scans the cache
        assert faults(raw, namespace, service, "answers") == []
        found = operator.run(find(operator, service, "answers"))
        assert found is not None
        assert (found.settings.shards, found.settings.source) == (shards, 0)
    after = cache.entry(NAMES[5])
    assert after is not None
    assert after.access_count > before.access_count, "reads go on being counted"
    assert (
        replace(after, access_count=before.access_count, last_accessed=before.last_accessed, tier=before.tier) == before
    )
    assert cache.size() == len(NAMES)
    cache.invalidate_tags("all")
    assert cache.get_many(NAMES) == {}


# The tests below interleave one operation of a program with the move of a key, in every possible way.


def _one(step: Any) -> Flow[Any]:
    return (yield step)


def paused(backend: Backend, flow: Flow[Any], steps: int) -> Iterator[None]:
    """Run a flow, and pause once, before its step number `steps`."""
    at, step = 0, next(flow, None)
    while step is not None:
        if at == steps:
            yield
        try:
            step = flow.send(backend.run(_one(step)))
        except StopIteration:
            step = None
        at += 1
    if at <= steps:
        yield


def put_and_lose(cache: LRUCache) -> None:
    """Put a value that is evicted before the move goes on."""
    cache.put("k", "new")
    shard = cache._shared_state.shard("k")
    cache._shared_state.backend.run(commands.thin(shard.keys, 1, 1))
    cache._shared_state.backend.run(commands.thin(shard.keys, 1, 1))


OPERATIONS: dict[str, tuple[Callable[[LRUCache], object], object]] = {
    "nothing": (lambda cache: None, "old"),
    "get": (lambda cache: cache.get("k"), "old"),
    "delete": (lambda cache: cache.delete("k"), None),
    "delete_many": (lambda cache: cache.delete_many(["k", "l"]), None),
    "put": (lambda cache: cache.put("k", "new"), "new"),
    "put_many": (lambda cache: cache.put_many({"k": "new"}), "new"),
    "put and evict": (put_and_lose, None),
    "pop": (lambda cache: cache.pop("k"), None),
    "clear": (lambda cache: cache.clear(), None),
    "invalidate": (lambda cache: cache.invalidate_tags("t"), None),
    "replace": (lambda cache: cache.replace("k", "new"), "new"),
    "add": (lambda cache: cache.add("k", "new"), "old"),
}


def outcomes(backend: Backend, other: Backend, steps: int, puller_steps: int | None = None) -> dict[str, object]:
    """Run each operation while a move is paused. Return the wrong values that a read finds afterwards, by operation.

    Args:
        backend: the connections of the move.
        other: the connections of the program that runs the operation.
        steps: step of the move before which the operation runs.
        puller_steps: step of a second move of the same key, by another process. The second move stops before this step
            until the first move is paused. None if there is no second move.
    """
    wrong: dict[str, object] = {}
    for operation, (work, expected) in OPERATIONS.items():
        name = f"{operation} {steps} {puller_steps}"
        cache = LRUCache(4000, name=name, backend=other)
        cache.put("k", "old", tags=["t"])
        change = Resharding(backend, "cache", name, 4)
        backend.run(change.begin())
        assert change._settings is not None
        where = (change._settings, change._new, change._old, ["k"])
        puller = iter(()) if puller_steps is None else paused(backend, pull(*where), puller_steps)
        next(puller, None)
        pause = paused(backend, move(*where), steps)
        next(pause)
        next(puller, None)
        work(cache)
        next(pause, None)
        found = cache.get("k")
        if found != expected:
            wrong[operation] = found
    return wrong


@pytest.mark.parametrize("steps", range(5))
def test_operation_during_a_move_counts(server: Server, connect: Callable[..., Backend], steps: int) -> None:
    assert outcomes(connect(server.url), connect(server.url), steps) == {}


@pytest.mark.thorough
@pytest.mark.servers("valkey")
@pytest.mark.parametrize("puller_steps", range(1, 6))
@pytest.mark.parametrize("steps", range(5))
def test_operation_during_two_moves_of_one_key_counts(
    server: Server, connect: Callable[..., Backend], steps: int, puller_steps: int
) -> None:
    assert outcomes(connect(server.url), connect(server.url), steps, puller_steps) == {}


@pytest.mark.thorough
@pytest.mark.servers("valkey")
@pytest.mark.parametrize(
    ("script", "line", "instead", "caught"),
    [
        ("adopt", "elseif I.marks and call('HGET', MARKS, name) == mark then", "else", {"delete", "pop"}),
        ("delete", "  if I.marks then I.call('HDEL', I.marks, key) end\n", "", {"delete", "delete_many"}),
        ("pop", "if I.marks then I.call('HDEL', I.marks, KEY) end\n", "", {"pop"}),
        ("put", "if I.marks then call('HDEL', I.marks, KEY) end\n", "", {"put and evict"}),
    ],
    ids=["adopt", "delete", "pop", "put"],
)
def test_move_without_a_guard_is_caught(
    server: Server,
    connect: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    line: str,
    instead: str,
    caught: set[str],
) -> None:
    alter(monkeypatch, f"cache/{script}", line, instead)
    wrong = outcomes(connect(server.url), connect(server.url), 2, 4)
    assert wrong.keys() >= caught


@pytest.mark.thorough
@pytest.mark.parametrize("steps", range(8))
def test_operation_during_the_exchange_counts(
    server: Server, connect: Callable[..., Backend], namespace: str, steps: int
) -> None:
    """The command stops between two steps of the exchange. The program works meanwhile, then the command continues."""
    backend, other, wrong = connect(server.url), connect(server.url), dict[str, object]()
    for operation, (work, expected) in OPERATIONS.items():
        name = f"{operation} {steps}"
        cache = LRUCache(4000, name=name, backend=other, shards=2)
        cache.put("k", "old", tags=["t"])
        own = keys.cache(namespace, "cache", name)
        stored = backend.run(commands.relayout(own, "begin", 4, 0))
        assert isinstance(stored, Settings)
        pause = paused(backend, exchange(backend, "cache", name, stored), steps)
        next(pause)
        work(cache)
        next(pause, None)
        found = cache.get("k")
        if found != expected:
            wrong[operation] = found
    assert wrong == {}


def test_command_changes_the_number_and_shows_the_progress(
    agentperf: Run, server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(server.url)
    cache = lru(backend, 1)
    cache.put_many(VALUES)
    assert cache.get_many(NAMES) == VALUES
    assert cache.stats().hits == len(NAMES)  # calling `stats` sends the read counts of this process to the server
    refused = agentperf("cache", "reshard", "answers", "--shards", "3", "--yes")
    assert refused.returncode != 0
    assert "a power of two, 1 to 256" in refused.stderr
    refused = agentperf("cache", "reshard", "answers", "--shards", "256", "--yes")
    assert refused.returncode != 0
    assert "max_size" in refused.stderr
    assert not finish(backend, 4, steps=0).done
    moving = document(agentperf("cache", "stats", "answers", "--json"), "cache stats")
    assert moving["moving"] == {"from": 1, "to": 4, "left": moving["moving"]["left"]}
    assert 0 < moving["moving"]["left"] <= len(NAMES)
    assert moving["hits"] == len(NAMES), "the counters continue"
    assert "changes from 1 shard to 4" in " ".join(agentperf("cache", "stats", "answers").stdout.split())
    assert sorted(cache.scan()) == sorted(cache.keys()) == sorted(NAMES)
    other = agentperf("cache", "reshard", "answers", "--shards", "8", "--yes")
    assert "4: the change to 4 is not finished" in " ".join(other.stderr.split())
    assert agentperf("cache", "drop", "answers", "--yes").returncode != 0
    deleted = document(agentperf("cache", "delete", "answers", *NAMES[:3], "--yes", "--json"), "cache delete")
    assert deleted["removed"] == 3
    done = document(agentperf("cache", "reshard", "answers", "--shards", "4", "--yes", "--json"), "cache reshard")
    assert (done["from"], done["to"]) == (1, 4)
    assert cache.get_many(NAMES) == {name: VALUES[name] for name in NAMES[3:]}
    stats = document(agentperf("cache", "stats", "answers", "--json"), "cache stats")
    assert (stats["shards"], stats["moving"], stats["entries"]) == (4, None, len(NAMES) - 3)
    again = agentperf("cache", "reshard", "answers", "--shards", "4", "--yes")
    assert "has 4 shards" in again.stdout
    got = document(agentperf("cache", "get", "answers", NAMES[9], "--json"), "cache get")
    where = keys.cache_shards(namespace, "cache", "answers", 4, 1)
    assert got["redis_key"] in {each.entry(NAMES[9]) for each in where}
    assert "shard" in agentperf("inspect", got["redis_key"]).stdout
    with pytest.raises(InvalidArgument, match="`agentperf cache reshard answers --shards 2`"):
        lru(connect(server.url), 2).get("k")


def test_programs_and_their_copies_follow(server: Server, connect: Callable[..., Backend]) -> None:
    """Programs follow a later change, even if they chose the number of shards themselves or keep local copies."""
    operator = connect(server.url)
    chosen = lru(connect(server.url), 1)
    copies = lru(connect(server.url), local_size=100)
    strict = LRUCache(8000, name="answers", backend=connect(server.url), strict=True)
    chosen.put("k", 1)
    copied(copies, "k")
    assert strict.get("k") == 1
    for shards in (8, 2):
        assert finish(operator, shards).done
        chosen.put("k", shards)
        wait_until(lambda shards=shards: copies.get("k") == shards, "the change")  # type: ignore[misc]
        assert strict.get("k") == shards
        assert copies.get_or_compute("k", lambda: 0) == shards
        assert chosen.ttl("k") is not None
        assert chosen.incr("k") == shards + 1


def test_dropped_cache_begins_with_a_new_layout(server: Server, connect: Callable[..., Backend]) -> None:
    """Processes may still know the shards of earlier layouts."""
    operator, cache = connect(server.url), lru(connect(server.url))
    stale = lru(connect(server.url))
    cache.put_many(VALUES)
    assert stale.get_many(NAMES) == VALUES
    assert finish(operator, 4).done
    found = operator.run(find(operator, "cache", "answers"))
    assert found is not None
    cache.flush()
    assert operator.run(found.drop()) == len(NAMES)
    fresh = lru(connect(server.url))
    fresh.put("k", 1)
    stale.put("l", 2)
    assert (fresh.get("l"), stale.get("k")) == (2, 1)


def test_full_cache_stays_within_its_limits(server: Server, connect: Callable[..., Backend]) -> None:
    operator, cache = connect(server.url), lru(connect(server.url), max_size=500, max_bytes=30_000)
    cache.put_many({f"key {number}": "x" * 40 for number in range(600)})
    before = cache.keys()
    change = Resharding(operator, "cache", "answers", 2)
    state = operator.run(change.begin())
    assert state is not None
    while not state.done:
        cache.put_many({f"new {number}": "x" * 40 for number in range(20)})
        stats = cache.stats()
        assert stats.size <= 500
        assert stats.bytes <= 30_000
        state = operator.run(change.step())
    kept = set(before) & set(cache.keys())
    assert len(kept) > 0.8 * len(before), "a sixteenth makes room, and the new entries push out others"
    assert before[-1] in kept
