"""Compares a cache of 16 shards with a cache of one shard, under the same mixed load, on a Cluster of three nodes.

The server time of a node is the processor time of its process. To measure it, the commands of the load are sent in one
pipeline per node, to one node after the other. The client's time is the processor time of this process per call. Both
caches evict entries during the load.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.cache import commands as cached
from agentperf_redis.cache.entry_format import payload
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.command import Command
from tests.benchmarks.measure import Bench, Row, micros
from tests.benchmarks.nodes import run_by_node
from tests.support.servers import Server
from tests.support.traces import zipf

SHARDS = 16
BUSIEST_GOAL = 0.45
"""Maximum server time of the busiest node with 16 shards, relative to the only busy node with one shard. Ideal: 1/3."""
CLIENT_GOAL = 1.1
CAPACITY, KEYS = 8000, 16_000
VALUE = "x" * 200
AT_ONCE = 20_000
"""Number of commands in a load. They are enough to fill the processor's caches on each of the nodes."""
CALLS = 300

Cache = LRUCache | TieredCache


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the rows of both kinds of caches."""
    server = Server("cluster")
    undivided, divided = (Backend(server.url, namespace=name) for name in ("one", "many"))
    nodes = [node.client() for node in server.nodes]
    try:
        for kind, make in (("LRU", lru), ("tiered", tiered)):
            one, many = make(undivided, None), make(divided, SHARDS)
            yield from compared(bench, nodes, kind, one, many)
            yield many_keys(bench, kind, one, many)
    finally:
        for node in nodes:
            node.close()
        undivided.close()
        divided.close()
        server.stop()


def lru(backend: Backend, shards: int | None) -> Cache:
    return LRUCache(CAPACITY, name="load", shards=shards, backend=backend)


def tiered(backend: Backend, shards: int | None) -> Cache:
    sizes = (CAPACITY // 16, CAPACITY // 8, CAPACITY - CAPACITY // 16 - CAPACITY // 8)
    return TieredCache(*sizes, name="load", shards=shards, backend=backend)


def load_of(cache: Cache, keys: list[str], chance: random.Random) -> list[Command[Any]]:
    """Return the commands of a load: mostly reads, some puts, a few deletions, and the invalidation of a tag."""
    shared, data = cache._shared_state, cache._flows.writer.codec.encode(VALUE)
    commands: list[Command[Any]] = []
    for key in keys:
        where = shared.shard(key).keys
        match chance.randrange(20):
            case 0:
                commands.append(cached.delete(where, [key], "bench"))
            case choice if choice < 6:
                commands.append(
                    cached.put(
                        *(where, key, payload("request", 0, 0, ("t",), data), "request"),
                        until_ms=10**14,
                        seen=0,
                        again=False,
                        ttl_ms=-1,
                        tier=None,
                        token="",
                        origin="bench",
                        writer="bench",
                        report=NO_REPORT,
                        tags=("t",),
                    )
                )
            case _:
                commands.append(cached.read(where, key))
    commands += [cached.invalidate_tags(shard.keys, ("t",), "bench") for shard in shared.shards]
    return commands


def call_each(cache: Cache, keys: list[str], chance: random.Random) -> None:
    """Do one call for each key: mostly reads, with puts after misses, and some calls of other kinds."""
    for key in keys:
        match chance.randrange(500):
            case 0:
                cache.invalidate_tags("t")
            case choice if choice < 20:
                cache.delete(key)
            case choice if choice < 60:
                cache.get_or_compute(key, lambda: VALUE)
            case choice if choice < 100:
                cache.put(key, VALUE, tags=("t",))
            case _:
                if cache.get(key) is None:
                    cache.put(key, VALUE)


def compared(bench: Bench, nodes: list[Any], kind: str, one: Cache, many: Cache) -> Iterator[Row]:
    """Compare two caches by the server time of the busiest node, and by the client's time."""
    turns = 2 * bench.rounds
    keys = zipf(AT_ONCE * (turns + 1), KEYS, 0.9, seed=4)
    for cache in (one, many):
        cache.put_many({f"k{number}": VALUE for number in range(CAPACITY)})
        run_by_node(cache._backend, load_of(cache, keys[:AT_ONCE], random.Random(0)))
        call_each(cache, keys[:CALLS], random.Random(0))
        cache.flush()
    busiest: dict[Cache, list[float]] = {one: [], many: []}
    spread: Counter[int] = Counter()
    for turn in range(1, turns + 1):
        its = keys[turn * AT_ONCE : (turn + 1) * AT_ONCE]
        for cache in in_turn(turn, one, many):
            load = load_of(cache, its, random.Random(turn))
            before = [server_us(node) for node in nodes]
            run_by_node(cache._backend, load)
            usec = [server_us(node) - used for node, used in zip(nodes, before, strict=True)]
            busiest[cache].append(max(usec) / AT_ONCE)
            if cache is many:
                spread.update(dict(enumerate(map(int, usec))))
    # Other load on the machine can only lengthen the times. So the lower quartiles are compared.
    mine, theirs = (statistics.quantiles(busiest[cache], n=4)[0] for cache in (many, one))
    shares = "/".join(f"{100 * usec / spread.total():.0f}" for usec in spread.values())
    yield Row(
        f"busiest of 3 nodes, {kind}, {SHARDS} shards ({shares} %)",
        micros(mine / 1e6),
        f"one shard {micros(theirs / 1e6)}",
        mine / theirs,
        f"<= {BUSIEST_GOAL} x",
        mine / theirs <= BUSIEST_GOAL,
    )
    ratios = []
    for turn in range(bench.rounds * 8):  # many short turns, so that other load on the machine hits both caches equally
        spent = {}
        for cache in in_turn(turn, one, many):
            begun = time.process_time()
            call_each(cache, keys[turn * CALLS : (turn + 1) * CALLS], random.Random(turn))
            spent[cache] = time.process_time() - begun
        ratios.append(spent[many] / spent[one])
    ratio = statistics.median(ratios)
    work = f"client's processor time a call, {kind}, {SHARDS} shards"
    yield Row(work, "", "one shard", ratio, f"<= {CLIENT_GOAL} x", ratio <= CLIENT_GOAL)


def in_turn(turn: int, one: Cache, many: Cache) -> tuple[Cache, Cache]:
    """Return both caches. Each is the first in every other turn."""
    return (one, many) if turn % 2 else (many, one)


def many_keys(bench: Bench, kind: str, one: Cache, many: Cache) -> Row:
    """Compare reads of many keys: one command on one node, or one pipeline to each of three nodes."""
    names = [f"k{number}" for number in range(CAPACITY - 100, CAPACITY)]
    pair = bench.pair(
        lambda times: [many.get_many(names) for _ in range(times)],
        lambda times: [one.get_many(names) for _ in range(times)],
        100,
    )
    work = f"get_many of {len(names)} keys, {kind}, {SHARDS} shards"
    return Row(work, micros(pair.ours_s), f"one shard {micros(pair.reference_s)}", pair.ratio, "", None)


def server_us(node: Any) -> float:
    """Return the processor time that a node has used so far, us."""
    used = node.info("cpu")
    return 1e6 * (float(used["used_cpu_user"]) + float(used["used_cpu_sys"]))
