"""Several processes do random operations on a cache. After every script, the indexes, limits and counters agree."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import pytest

from agentperf_redis import script
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, Tier, TieredCache
from tests.support.cache_scan import faults, without_value
from tests.support.servers import Raw, Server, wait_until
from tests.support.workers import Workers

PROCESSES, TURNS = 4, 5
_CACHES = {
    "small": {"max_size": 30, "default_ttl": None},
    "bytes": {"max_size": 1000, "max_bytes": 3000},
    "tinylfu": {"max_size": 50, "policy": "tinylfu"},
    "divided": {"max_size": 1000, "max_bytes": 4000, "shards": 4},
}
_TIERED = {
    "tiers": {"hot_size": 3, "warm_size": 5, "cold_size": 12, "hot_ttl": 0.02, "warm_ttl": 0.05, "cold_ttl": 0.1},
    "slru": {"hot_size": 3, "warm_size": 5, "cold_size": 12, "policy": "lru", "max_bytes": 900},
}


def caches(backend: Backend) -> list[LRUCache | TieredCache]:
    return [
        *(LRUCache(name=name, backend=backend, **options) for name, options in _CACHES.items()),  # type: ignore[arg-type]
        *(TieredCache(name=name, backend=backend, **options) for name, options in _TIERED.items()),  # type: ignore[arg-type]
    ]


AFTERWARDS = """
local reply = (function()
%s
end)()
local tag, sum, members = string.sub(KEYS[1], 1, -5), 0, 0
if string.sub(KEYS[1], -5) ~= ':meta' then return reply end
local found = redis.call('HMGET', KEYS[1], 'settings', 'bytes', 'next')
if not found[1] then return reply end
local hot, warm, cold, most = string.match(found[1], 'capacity (%%d+)/(%%d+)/(%%d+) bytes (%%d+)')
local sizes, first_ms = {}, tonumber(found[3] or nil) or math.huge
local fields, early = redis.call('HGETALL', tag .. 'size'), false
for i = 1, #fields, 2 do
  sizes[#sizes + 1] = fields[i + 1]
  sum = sum + string.sub(fields[i + 1], -10)  -- see pack_size in index.lua
  local expiry_ms = redis.call('PEXPIRETIME', tag .. 'e:' .. fields[i])
  early = early or (expiry_ms >= 0 and expiry_ms < first_ms)
end
for _, tier in ipairs({'hot', 'warm', 'cold', 'new'}) do members = members + redis.call('ZCARD', tag .. tier) end
if #sizes > hot + warm + cold or members ~= #sizes or sum ~= tonumber(found[2] or 0) or (most ~= '0' and sum > tonumber(most))
  or (hot ~= '0' and redis.call('ZCARD', tag .. 'hot') > tonumber(hot))
  or (warm ~= '0' and redis.call('ZCARD', tag .. 'warm') > tonumber(warm))
  or early then
  redis.call('RPUSH', tag .. 'faults', #sizes .. ' entries, ' .. members .. ' members, ' .. sum .. ' bytes, '
    .. (found[2] or '') .. ' accounted, under ' .. found[1])
end
redis.call('INCR', tag .. 'checks')
return reply
"""
"""Runs a script and, in the same step, checks the state that the script has left."""


def check_after_every_script(without: str) -> None:
    """In a worker process: check the state after every script of a cache. `without` is a text to cut from scripts."""
    scripts: Any = script.Script
    plain, texts = scripts.source.fget, dict[str, str]()

    def source(self: script.Script) -> str:
        if self.name not in texts:
            text: str = plain(self)
            checked = AFTERWARDS % (text.replace(without, "") if without else text)
            texts[self.name] = checked if self.name.startswith("cache/") else text
        return texts[self.name]

    scripts.source = property(source)


def operate(url: str, namespace: str, seed: int, operations: int, without: str | None = None) -> int:
    """A worker process: do random operations on all caches. Returns how often a value was wrong."""
    if without is not None:
        check_after_every_script(without)
    backend = Backend(url, namespace=namespace)
    chance, wrong = random.Random(seed), 0
    all_caches = caches(backend)
    for step in range(operations):
        cache = chance.choice(all_caches)
        key = f"k{int(chance.paretovariate(0.7)) % 80}"
        match chance.randrange(20):
            case 0:
                cache.delete(key)
            case 1 if step % 7 == 0:
                cache.clear()
            case 2:
                cache.invalidate_tags(chance.choice("tuv"))
            case 3:
                cache.sweep()
            case 4:
                cache.put_many({f"{key}{number}": [f"{key}{number}", "y" * number] for number in range(5)})
            case 5 if step % 3:
                value = [key, "z" * chance.randrange(60)]
                store = chance.choice((cache.add, cache.replace))
                store(key, value, ttl=chance.choice((None, 0.03, 10)))
                cache.incr(f"counter {key}", chance.randrange(-300, 300))
            case 6 if step % 3:
                cache.touch(key, chance.choice((None, 0.001, 0.03, math.inf)))
                found = cache.pop(key)
                wrong += found is not None and found[0] != key
            case 5 | 6:
                wrong += cache.get_or_compute(key, partial(list, (key, "")))[0] != key
            case choice if choice < 12:
                ttl = chance.choice((None, None, 0.001, 0.03, 10))
                value = [key, "x" * chance.randrange(120)]
                if isinstance(cache, TieredCache):
                    cache.put(key, value, chance.choice((None, "hot", "warm", "cold")), ttl=ttl)
                else:
                    cache.put(key, value, ttl, tags=chance.choice(((), ("t",), ("u", "v"))))
            case _:
                found = cache.get(key)
                wrong += found is not None and found[0] != key
    backend.close()
    return wrong


@pytest.mark.thorough
def test_limits_and_counters_hold_under_four_processes(
    server: Server, namespace: str, workers: Workers, raw: Raw, backend: Backend
) -> None:
    results = workers.run(operate, [(server.url, namespace, seed, 400) for seed in range(PROCESSES)])

    assert results == [0] * PROCESSES
    agree_and_leave_nothing(backend, raw)


def entries_that_expire(backend: Backend, raw: Raw, count: int) -> LRUCache:
    """Return a cache with one entry that stays, and `count` entries that have just expired and are still resident."""
    cache = LRUCache(1000, name="brief", backend=backend)
    cache.put_many({f"k{number}": number for number in range(count)}, 60)
    cache.put("stays", 1)
    where = cache._shared_state.keys
    raw.unlink(*(where.entry(f"k{number}") for number in range(count)))
    raw.hset(where.meta, "next", 1)
    return cache


def test_write_removes_all_expired_entries_of_a_small_cache(backend: Backend, raw: Raw) -> None:
    cache = entries_that_expire(backend, raw, 20)
    cache.put("another", 1)
    stats = cache.stats()
    assert (stats.size, stats.expirations, stats.evictions) == (2, 20, 0)
    assert faults(raw, backend.namespace, "cache", "brief") == []


@pytest.mark.parametrize("count", [200, 700], ids=["sampled", "scanned"])
def test_writes_remove_expired_entries_of_a_large_cache(backend: Backend, raw: Raw, count: int) -> None:
    cache = entries_that_expire(backend, raw, count)
    where = cache._shared_state.keys
    writes = 0
    while raw.hlen(where.size) > 2 + count // 8:
        writes += 1
        assert writes < 10 * count, "an expired entry is removed within as many writes as there are entries, on average"
        cache.put_many(dict.fromkeys([f"w{number % 2}" for number in range(50)], 1))
        cache.put("w0", 1)
    assert cache.get("stays") == 1
    assert faults(raw, backend.namespace, "cache", "brief") == []


def test_put_of_an_expired_entry_makes_a_new_one(backend: Backend, raw: Raw) -> None:
    cache = TieredCache(hot_size=2, warm_size=50, cold_size=100, name="brief", backend=backend)
    cache.put_many({f"k{number}": number for number in range(40)}, "warm")
    assert [cache.get("k1"), cache.get("k1")] == [1, 1]
    cache.flush()
    where = cache._shared_state.keys
    raw.unlink(where.entry("k1"))
    raw.hset(where.meta, "next", 1)
    cache.put("k1", 2)
    entry = cache.entry("k1")
    assert entry is not None
    assert (entry.value, entry.access_count, entry.tier) == (2, 0, Tier.COLD)
    assert cache.stats().expirations == 1
    assert faults(raw, backend.namespace, "tiered", "brief") == []


def agree_and_leave_nothing(backend: Backend, raw: Raw) -> None:
    """Scan each cache completely, once as the processes left it and once after a sweep. Then clear and sweep it.

    After that, only the keys `meta`, `epochs`, `checks` and `history` may be left, and stored replies of requests.
    These replies expire.
    """
    namespace = backend.namespace
    for cache in caches(backend):
        service = "cache" if isinstance(cache, LRUCache) else "tiered"
        assert faults(raw, namespace, service, cache.name) == [], cache
        stats = cache.stats()
        assert stats.hits > 0
        assert stats.misses > 0

        for key in list(raw.scan_iter(match=f"{namespace}:*{service}:{cache.name}*}}:e:*"))[::2]:
            raw.unlink(key)  # as a server with an eviction policy does
        cache.put("soon over", 1, ttl=0.001)
        wait_until(lambda cache=cache: cache.entry("soon over") is None, "the entry to expire")  # type: ignore[misc]
        gone = without_value(raw, namespace, service, cache.name)
        cache.sweep()
        assert not {*gone} & {*without_value(raw, namespace, service, cache.name)}, "after one sweep"
        assert faults(raw, namespace, service, cache.name) == [], cache

        cache.clear()
        cache.sweep()
        for shard in cache._shared_state.shards:  # on a busy machine, some puts may have been resent
            resent = shard.keys.resent
            wait_until(lambda resent=resent: not raw.exists(resent), "the ids of resent puts to expire")  # type: ignore[misc]
        keys_left = list(raw.scan_iter(match=f"{namespace}:*{service}:{cache.name}*}}:*"))
        replies = [key for key in keys_left if "}:r:" in key]
        assert all(raw.pttl(key) != -1 for key in replies), "the replies of requests expire"
        left = {key.rpartition("}:")[2] for key in keys_left if key not in replies}
        assert left <= {"meta", "epochs", "checks", "history"}, cache


@pytest.mark.thorough
def test_limits_and_counters_hold_after_every_script(
    server: Server, namespace: str, workers: Workers, raw: Raw, backend: Backend
) -> None:
    for compute_lease in range(TURNS):  # new workers in each turn: longer runs may exceed a worker's timeout
        seeds = range(PROCESSES * compute_lease, PROCESSES * (compute_lease + 1))
        assert workers.run(operate, [(server.url, namespace, seed, 1000, "") for seed in seeds]) == [0] * PROCESSES
    assert list(raw.scan_iter(match=f"{namespace}:*:faults")) == []
    checks = [int(raw.get(key)) for key in raw.scan_iter(match=f"{namespace}:*:checks")]
    assert len(checks) == len(_CACHES) + len(_TIERED) + 4, "the divided cache has four shards beside its settings"
    assert sum(checks) > 10_000
    agree_and_leave_nothing(backend, raw)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "without",
    [
        "  I.balance(KEY)\n",
        "    I.bytes = I.bytes - replaced\n",
        "  if ttl_ms > 0 and (not I.next or expiry_ms < I.next) then I.next = expiry_ms end\n",
        "  I.bytes = I.bytes + weight\n",
        "      if #leave[i] > 0 then I.call('ZREM', I.tier[i], unpack(leave[i])) end\n",
    ],
)
def test_script_fault_fails_the_check(
    server: Server, namespace: str, workers: Workers, raw: Raw, backend: Backend, without: str
) -> None:
    sources = script.Script("cache/put").source
    assert without in sources

    def found() -> bool:
        return any(raw.exists(f"{cache._shared_state.keys.tag}:faults") for cache in caches(backend))

    for seed in range(1, 6):  # several short runs, because a long run may exceed a worker's timeout
        workers.run(operate, [(server.url, namespace, seed, 300, without)])
        if found():
            break
    assert found()
