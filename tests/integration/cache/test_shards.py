"""A cache with several shards behaves like one cache, although its entries and limits are divided among slots."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis.crc import key_slot

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cache.commands.replies import NO_SETTINGS
from agentperf_redis.cache.flows import invalidation
from agentperf_redis.cache.flows.invalidation import Eraser
from agentperf_redis.cache.flows.ranking import EntryRanking
from agentperf_redis.cache.flows.settings import ready as ready_shard
from agentperf_redis.cache.operator import ExistingCache, find
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendFull, BackendUnavailable, CorruptState, InvalidArgument
from tests.support.cache_scan import faults
from tests.support.caches import copied
from tests.support.calls import Call
from tests.support.commandline import Run, document
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import hurry

NAMES = [f"key {number}" for number in range(120)]
LONG = "long " * 40


@pytest.fixture
def dead_backend(connect: Callable[..., Backend]) -> Backend:
    return connect("redis://127.0.0.1:1", deadline=0.05)


def lru(backend: Backend, shards: int | None = 4, max_size: int = 4000, **options: Any) -> LRUCache:
    return LRUCache(max_size, name="answers", backend=backend, shards=shards, **options)


def tiered(backend: Backend, shards: int | None = 4, **options: Any) -> TieredCache:
    return TieredCache(400, 600, 3000, name="answers", backend=backend, shards=shards, **options)


def existing(backend: Backend) -> ExistingCache:
    found = backend.run(find(backend, "cache", "answers"))
    assert found is not None
    return found


@pytest.mark.parametrize("make", [lru, tiered])
def test_entries_lie_in_the_documented_shards(
    call: Call, backend: Backend, raw: Raw, namespace: str, make: Callable[..., LRUCache | TieredCache]
) -> None:
    service = "cache" if make is lru else "tiered"
    call(make(backend), "put_many", dict.fromkeys([*NAMES, LONG], 1))
    found = sorted(raw.scan_iter(match=f"{namespace}:*:e:*"))
    shards = {name: key_slot(name.encode()) % 4 for name in map(keys.stored_name, [*NAMES, LONG])}
    tags = [where.tag for where in keys.cache_shards(namespace, service, "answers", 4)]
    assert found == sorted(f"{tags[shard]}:e:{name}" for name, shard in shards.items())
    assert all(tag.startswith(f"{namespace}:{{{service}:answers#{shard}/4.") for shard, tag in enumerate(tags))
    assert set(shards.values()) == {0, 1, 2, 3}
    own = keys.cache(namespace, service, "answers")
    assert list(raw.scan_iter(match=f"{own.tag}:*")) == [own.meta]
    assert set(raw.hgetall(own.meta)) == {"schema", "settings"}
    assert raw.hget(own.meta, "settings").endswith(" shards 4")
    assert faults(raw, namespace, service, "answers") == []


@pytest.mark.parametrize("make", [lru, tiered])
def test_operations_cover_all_shards(call: Call, backend: Backend, make: Callable[..., LRUCache | TieredCache]) -> None:
    cache = make(backend)
    values = {name: [name] for name in NAMES}
    assert call(cache, "put_many", values, tags=["all"]) == len(NAMES)
    assert call(cache, "get_many", [*NAMES, "none"]) == values
    assert call(cache, "size") == len(NAMES)
    assert sorted(call(cache, "keys")) == sorted(NAMES)
    assert sorted(cache.scan(batch=10)) == sorted(NAMES)
    assert sorted(cache.scan(match="key 1*")) == sorted(name for name in NAMES if name.startswith("key 1"))
    stats = call(cache, "stats")
    assert (stats.size, stats.hits, stats.misses, stats.max_size) == (len(NAMES), len(NAMES), 1, 4000)
    assert call(cache, "delete_many", [*NAMES[:50], "none"]) == 50
    assert call(cache, "put", LONG, 1, tags=["all"])
    assert call(cache, "entry", LONG).key == LONG
    assert [call(cache, "incr", "n") for _ in range(3)] == [1, 2, 3]
    assert call(cache, "pop", NAMES[60]) == values[NAMES[60]]
    assert call(cache, "touch", NAMES[61], 5) is True
    assert 0 < call(cache, "ttl", NAMES[61]) <= 5
    call(cache, "invalidate_tags", "all")
    assert call(cache, "get_many", [*NAMES, LONG, "n"]) == {"n": 3}
    assert call(cache, "sweep") == len(NAMES) - 50
    call(cache, "clear")
    assert call(cache, "get_many", [*NAMES, "n"]) == {}
    assert call(cache, "size") == 0
    assert call(cache, "get_or_compute", NAMES[0], lambda: 5) == 5
    assert call(cache, "get", NAMES[0]) == 5


def test_operations_on_many_keys_send_one_batch(backend: Backend) -> None:
    """A batch is sent as one pipeline to each node."""
    cache = lru(backend)
    cache.put_many(dict.fromkeys(NAMES, 1))
    cache.get_many(NAMES)
    flows = cache._flows
    for flow, commands in (
        (flows.reader.get_many(NAMES), 4),
        (flows.writer.put_many(dict.fromkeys(NAMES, 2), None, ()), len(NAMES)),
        (flows.eraser.delete_many(NAMES), 4),
        (flows.eraser.invalidate_tags(["t"]), 4),
        (flows.eraser.clear(), 4),
    ):
        step = next(flow)
        assert isinstance(step, Batch)
        assert len(step.commands) == commands
        flow.close()


@pytest.mark.thorough
def test_limits_hold_in_each_shard(backend: Backend, raw: Raw, namespace: str) -> None:
    cache = lru(backend, 16, max_bytes=160_000)
    cache.put_many({f"key {number}": "x" * 60 for number in range(6000)})
    assert cache.size() <= 4000
    assert cache.stats().bytes <= 160_000
    assert faults(raw, namespace, "cache", "answers") == []
    large = secrets.token_hex(10_000)
    assert cache.put("large", large) is False, "a value that exceeds its shard's part of the bytes is refused"
    settings = [raw.hget(where.meta, "settings") for where in keys.cache_shards(namespace, "cache", "answers", 16)]
    assert settings == ["lru capacity 0/0/250 bytes 10000 ttl 0/0/0"] * 16


def test_shares_add_up_to_the_limits(backend: Backend) -> None:
    settings = tiered(backend, 8, max_bytes=12_345)._shared_state.settings
    shares = [settings.of_shard(shard) for shard in range(8)]
    assert tuple(map(sum, zip(*(each.capacities for each in shares), strict=True))) == settings.capacities
    assert sum(each.max_bytes for each in shares) == settings.max_bytes


@pytest.mark.parametrize(
    ("make", "argument", "reason"),
    [
        (lambda backend: lru(backend, 3), "shards", "a power of two, 1 to 256"),
        (lambda backend: lru(backend, 512, 10**6), "shards", "a power of two, 1 to 256"),
        (lambda backend: lru(backend, True), "shards", "a power of two, 1 to 256"),
        (lambda backend: lru(backend, 16, 3999), "max_size", "at least 4000 entries, so that each"),
        (lambda backend: LRUCache(shards=8, backend=backend), "max_size", "at least 2000 entries"),
        (lambda backend: lru(backend, 16, max_bytes=15), "max_bytes", "at least 16"),
        (lambda backend: TieredCache(3, 500, 3000, shards=4, backend=backend), "hot_size", "at least 4"),
        (lambda backend: TieredCache(shards=16, backend=backend), "cold_size", "at least 4000 entries with hot_size"),
    ],
)
def test_limits_that_cannot_be_divided_are_refused(
    dead_backend: Backend, make: Callable[[Backend], object], argument: str, reason: str
) -> None:
    with pytest.raises(InvalidArgument, match=reason) as refused:
        make(dead_backend)
    assert refused.value.argument == argument


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(("method", "args"), [("get", ("k",)), ("put", ("k", 1)), ("clear", ()), ("stats", ())])
def test_another_number_of_shards_is_refused(
    call: Call,
    server: Server,
    connect: Callable[..., Backend],
    raw: Raw,
    namespace: str,
    method: str,
    args: tuple[Any, ...],
) -> None:
    lru(connect(server.url)).put("k", "old")
    before = sorted(raw.scan_iter(match=f"{namespace}:*"))
    for shards in (1, 16):
        with pytest.raises(InvalidArgument, match="4, the number of shards of cache 'answers'") as refused:
            call(lru(connect(server.url), shards), method, *args)
        assert (refused.value.argument, refused.value.value) == ("shards", shards)
    assert sorted(raw.scan_iter(match=f"{namespace}:*")) == before
    undivided = LRUCache(name="one", backend=connect(server.url))
    undivided.put("k", 1)
    with pytest.raises(InvalidArgument, match="1, the number of shards"):
        call(LRUCache(4000, shards=4, name="one", backend=connect(server.url)), "get", "k")


def test_omitted_number_of_shards_is_that_of_the_cache(
    call: Call, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    first = lru(connect(server.url))
    call(first, "put_many", dict.fromkeys(NAMES, 1))
    found = [
        call(LRUCache(name="answers", backend=connect(server.url)), *operation)
        for operation in (("get_many", NAMES), ("size",), ("put", "other", 2), ("delete", NAMES[0]), ("get", "other"))
    ]
    assert found == [dict.fromkeys(NAMES, 1), len(NAMES), True, True, 2]
    assert not list(raw.scan_iter(match=f"{namespace}:{{cache:answers}}:e:*"))
    small = LRUCache(500, name="answers", backend=connect(server.url))
    with pytest.raises(InvalidArgument, match="at least 1000 entries") as refused:
        call(small, "put", "k", 1)
    assert refused.value.argument == "max_size"
    copies = LRUCache(name="answers", backend=connect(server.url), local_size=100)
    copied(copies, "other")
    call(first, "put", "other", 3)
    wait_until(lambda: copies.get("other") == 3, "the change")


def test_computed_value_finds_the_layout(call: Call, server: Server, connect: Callable[..., Backend]) -> None:
    lru(connect(server.url)).put("k", 1)
    other = LRUCache(name="answers", backend=connect(server.url))

    @other.cached()
    def work(number: int) -> int:
        return number

    assert work.refresh(5) == 5
    assert lru(connect(server.url)).get(work.key(5)) == 5


@pytest.mark.thorough
def test_changed_limit_applies_to_all_shards(server: Server, connect: Callable[..., Backend], namespace: str) -> None:
    first, second = lru(connect(server.url)), LRUCache(name="answers", backend=connect(server.url))
    first.put_many({f"key {number}": number for number in range(4000)})
    assert second.size() > 3600
    second.max_size = 1000
    second.put("key 1", 1)
    assert second.size() <= 1001
    first.put_many({f"other {number}": number for number in range(2000)})
    assert first.size() <= 1000
    with pytest.raises(InvalidArgument, match="at least 1000 entries"):
        second.max_size = 999
    assert second.max_size == 1000, "the refused value was not kept"


def test_dropped_cache_can_get_another_number(
    agentperf: Run, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    adopting = LRUCache(name="answers", backend=connect(server.url))
    cache = lru(connect(server.url))
    cache.put_many(dict.fromkeys(NAMES, 1))
    assert adopting.get(NAMES[0]) == 1
    adopting.flush()  # a report after the drop would create the cache again
    assert document(agentperf("cache", "drop", "answers", "--yes", "--json"), "cache drop")["entries"] == len(NAMES)
    assert {name.rsplit(":", 1)[1] for name in raw.scan_iter(match=f"{namespace}:{{cache:*")} == {"epochs"}
    fewer = lru(connect(server.url), 2)
    fewer.put_many(dict.fromkeys(NAMES, 2))
    assert fewer.get_many(NAMES) == dict.fromkeys(NAMES, 2)
    for name in NAMES:
        adopting.put(name, 3)
    assert fewer.get_many(NAMES) == dict.fromkeys(NAMES, 3)
    with pytest.raises(InvalidArgument, match="2, the number of shards"):
        cache.put_many(dict.fromkeys(NAMES, 4))


def test_lost_settings_are_written_again(call: Call, backend: Backend, raw: Raw, namespace: str) -> None:
    cache = lru(backend)
    call(cache, "put_many", dict.fromkeys(NAMES, 1))
    lost = keys.cache_shards(namespace, "cache", "answers", 4)[2]
    raw.delete(*raw.scan_iter(match=f"{lost.tag}:*"))
    assert call(cache, "put_many", dict.fromkeys(NAMES, 2)) == len(NAMES)
    assert call(cache, "get_many", NAMES) == dict.fromkeys(NAMES, 2)
    for where in keys.cache_shards(namespace, "cache", "answers", 4):
        raw.delete(*raw.scan_iter(match=f"{where.tag}:*"))
    raw.delete(keys.cache(namespace, "cache", "answers").meta)
    assert call(cache, "delete_many", NAMES) == 0
    assert call(cache, "get_or_compute", "k", lambda: 1) == 1
    assert call(cache, "get", "k") == 1
    assert faults(raw, namespace, "cache", "answers") == []


def test_damaged_settings_do_not_stop_reads(
    call: Call, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    lru(connect(server.url)).put("k", 1)
    raw.hset(keys.cache(namespace, "cache", "answers").meta, "settings", "lru capacity 1/1/1 shards 4")
    assert call(lru(connect(server.url)), "get", "k") == 1


def test_operators_see_one_cache(agentperf: Run, backend: Backend, namespace: str) -> None:
    cache = lru(backend)
    cache.put_many(dict.fromkeys(NAMES, "x"), tags=["all"])
    cache.put("large", "x" * 500)
    (listed,) = document(agentperf("cache", "list", "--json"), "cache list")["caches"]
    assert (listed["entries"], listed["shards"], listed["max_entries"]) == (len(NAMES) + 1, 4, 4000)
    stats = document(agentperf("cache", "stats", "answers", "--json"), "cache stats")
    assert sum(row["shards"] for row in stats["spread"]) == 4
    assert sum(row["entries"] for row in stats["spread"]) == stats["entries"] == len(NAMES) + 1
    assert sum(row["bytes"] for row in stats["spread"]) == stats["bytes"]
    shown = agentperf("cache", "stats", "answers").stdout
    assert f"{namespace}:{{cache:answers#<shard>/4.<number>}}:e:<key>; the shard is crc16(<key>) % 4" in shown
    got = document(agentperf("cache", "get", "answers", NAMES[3], "--json"), "cache get")
    shard = key_slot(NAMES[3].encode()) % 4
    assert got["redis_key"] == keys.cache_shards(namespace, "cache", "answers", 4)[shard].entry(NAMES[3])
    assert document(agentperf("inspect", got["redis_key"], "--json"), "inspect")["resource"] == "answers"
    assert f"the cache answers (shard {shard} of 4)" in " ".join(agentperf("inspect", got["redis_key"]).stdout.split())
    shown_keys = document(agentperf("cache", "keys", "answers", "--json"), "cache keys")["keys"]
    assert sorted(shown_keys) == sorted([*NAMES, "large"])
    assert document(agentperf("cache", "keys", "answers", "--limit", "5", "--json"), "cache keys")["complete"] is False
    assert document(agentperf("cache", "top", "answers", "--json"), "cache top")["size"][0]["key"] == "large"
    deleted = document(agentperf("cache", "delete", "answers", *NAMES[:9], "--yes", "--json"), "cache delete")
    assert deleted["removed"] == 9
    assert agentperf("cache", "invalidate-tag", "answers", "all", "--yes").returncode == 0
    assert cache.get_many([*NAMES, "large"]) == {"large": "x" * 500}
    assert document(agentperf("cache", "clear", "answers", "--yes", "--json"), "cache clear")["entries"] > 0
    assert cache.size() == 0


def test_rankings_cover_all_shards(backend: Backend) -> None:
    cache = lru(backend)
    cache.put_many({name: "x" * number for number, name in enumerate(NAMES)})
    found = backend.run(existing(backend).top(3))
    assert [entry.name for entry in found[EntryRanking.SIZE]] == NAMES[:-4:-1]


def test_history_adds_up_the_shards(call: Call, backend: Backend) -> None:
    cache = lru(backend)
    call(cache, "put_many", dict.fromkeys(NAMES, 1))
    for shard in existing(backend).shards:
        backend.run(cache_history.sample(shard))
    rows = call(cache, "series", window="5m", step="5m")
    assert [row.size for row in rows if row.size is not None] == [len(NAMES)]


@pytest.fixture
def samples_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.history._FIRST_S", 0.01)


@pytest.mark.usefixtures("samples_soon")
def test_use_of_one_shard_samples_all(backend: Backend, raw: Raw, namespace: str) -> None:
    cache = lru(backend)
    histories = [where.history for where in keys.cache_shards(namespace, "cache", "answers", 4)]
    wait_until(lambda: cache.put("k", 1) and all(map(raw.exists, histories)), "samples of all shards")


def test_reads_of_local_copies_count_in_their_shards(call: Call, backend: Backend) -> None:
    cache = lru(backend, local_size=1000)
    call(cache, "put_many", dict.fromkeys(NAMES, 1))

    def counted() -> bool:
        for name in NAMES:
            copied(cache, name)
        before = call(cache, "stats").hits
        for name in NAMES:
            call(cache, "get", name)
        return bool(call(cache, "stats").hits == before + len(NAMES))

    wait_until(counted, "an undisturbed round of reads")
    entries = [call(cache, "entry", name) for name in NAMES]
    assert all(entry is not None and entry.access_count > 0 for entry in entries)


def test_acknowledged_invalidation_is_seen_by_all(server: Server, connect: Callable[..., Backend]) -> None:
    """Readers in another process see only whole values. After an acknowledgement, they see no older value."""
    writer, reader = lru(connect(server.url), 16), lru(connect(server.url), 16)
    names = NAMES[:48]
    acknowledged, stop, wrong, reads = -1, threading.Event(), [], 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            least = acknowledged
            for name, value in reader.get_many(names).items():
                reads += 1
                if value != [name, value[1], "x" * 50] or value[1] <= least:
                    wrong.append((name, value, least))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for generation in range(25):
            writer.put_many({name: [name, generation, "x" * 50] for name in names}, tags=["all", f"g{generation}"])
            writer.invalidate_tags("all")
            acknowledged = generation
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert reader.get_many(names) == {}
    assert reads > 0


@pytest.fixture
def three_nodes(start_server: Callable[..., Server]) -> Server:
    """A Cluster that goes on when a node is lost."""
    return start_server("cluster", "--cluster-require-full-coverage", "no")


@pytest.mark.thorough
def test_lost_node_affects_its_shards_only(
    call: Call, three_nodes: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(three_nodes.url)
    cache = lru(backend, 16)
    call(cache, "put_many", dict.fromkeys(NAMES, 1), tags=["all"])
    dead = three_nodes.nodes[-1]
    ports = {name: backend.node_of(cache._shared_state.shard(name).keys.meta) for name in NAMES}
    lost = [name for name, node in ports.items() if node is not None and node.port == dead.port]
    kept = [name for name in NAMES if name not in lost]
    assert len(lost) > 20
    assert len(kept) > 20
    dead.kill()
    hurry(backend, 1.0)
    for name in kept:
        assert call(cache, "get", name) == 1
        assert call(cache, "put", name, 2, tags=["all"]) is True
        assert call(cache, "get_or_compute", name + " new", lambda: 3) == 3
    assert call(cache, "get_many", kept) == dict.fromkeys(kept, 2)
    for name in lost:
        begun = time.monotonic()
        with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{dead.port}") as failed:
            call(cache, "get", name)
        assert str(dead.port) in failed.value.reason
        assert time.monotonic() - begun < 2.0
    with pytest.raises(BackendUnavailable):
        call(cache, "invalidate_tags", "all")
    assert call(cache, "get_many", kept) == {}, "the other shards have the invalidation"
    assert call(cache, "get_or_compute", lost[0], lambda: 5) == 5, "computed without the cache"


@pytest.mark.thorough
def test_invalidation_that_missed_a_node_is_sent_later(
    call: Call, three_nodes: Server, connect: Callable[..., Backend]
) -> None:
    backend = connect(three_nodes.url)
    cache, reader = lru(backend, 16), lru(connect(three_nodes.url), 16)
    call(cache, "put_many", dict.fromkeys(NAMES, 1), tags=["all"])
    assert reader.get_many(NAMES) == dict.fromkeys(NAMES, 1)
    three_nodes.nodes[-1].pause()
    hurry(backend, 0.5)
    with pytest.raises(BackendUnavailable):
        call(cache, "invalidate_tags", "all")
    three_nodes.nodes[-1].resume()
    hurry(backend, 5.0)
    wait_until(lambda: not any(shard.pending_invalidations for shard in cache._shared_state.shards), "the invalidation")
    assert reader.get_many(NAMES) == {}


def test_invalidation_stays_pending_although_another_shard_fails_otherwise(
    call: Call, backend: Backend, server: Server, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = lru(backend), lru(connect(server.url))
    call(cache, "put_many", dict.fromkeys(NAMES, 1))
    away, full, *others = cache._shared_state.shards
    errors = {away: BackendUnavailable("node", "not_applied", "away"), full: BackendFull("node")}

    def ready(shard: Shard) -> Flow[None]:
        if shard in errors:
            raise errors[shard]
        yield from ready_shard(shard)

    monkeypatch.setattr(invalidation, "ready", ready)
    with pytest.raises(BackendUnavailable):
        call(cache, "clear")
    assert away.pending_invalidations
    left = {cache._shared_state.shard(name) for name in NAMES if other.get(name, fresh=True) == 1}
    assert left.isdisjoint(others), "the shards that can be reached have the invalidation"
    monkeypatch.undo()
    assert call(cache, "get", next(name for name in NAMES if cache._shared_state.shard(name) is away)) is None


def test_deletion_that_never_reaches_a_shard_raises(
    call: Call, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = lru(backend)
    call(cache, "put", "k", 1)

    def lost(_: Eraser, divide: Callable[[], list[Any]]) -> Flow[list[Any]]:
        yield from ()
        return [(request, NO_SETTINGS) for request in divide()]

    monkeypatch.setattr(Eraser, "_invalidate", lost)
    with pytest.raises(CorruptState, match="layout"):
        call(cache, "delete_many", ["k"])
