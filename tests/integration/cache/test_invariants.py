"""Processes do what they like to one cache; afterwards, and between, its indexes, limits and accounts agree."""

from __future__ import annotations

import random
from functools import partial

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from tests.integration.cache.scan import faults
from tests.servers import Raw, Server
from tests.workers import Workers

PROCESSES = 4
_CACHES = {
    "small": {"max_size": 30, "default_ttl": None},
    "bytes": {"max_size": 1000, "max_bytes": 3000},
    "tinylfu": {"max_size": 50, "policy": "tinylfu"},
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


def wreak(url: str, namespace: str, seed: int, operations: int) -> int:
    """A worker process: random operations on all caches. Returns how often a value was wrong."""
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


@pytest.mark.every_server
def test_limits_and_accounts_hold_whatever_four_processes_do(
    server: Server, namespace: str, workers: Workers, raw: Raw, backend: Backend
) -> None:
    results = workers.run(wreak, [(server.url, namespace, seed, 600) for seed in range(PROCESSES)])

    assert results == [0] * PROCESSES
    for cache in caches(backend):
        service = "cache" if isinstance(cache, LRUCache) else "tiered"
        assert faults(raw, namespace, service, cache.name) == [], cache
        stats = cache.stats()
        assert stats.hits > 0
        assert stats.misses > 0
        cache.clear()
        cache.sweep()
        left = {key.rpartition("}:")[2] for key in raw.scan_iter(match=f"{namespace}:*{service}:{cache.name}}}:*")}
        assert left <= {"meta", "gen"}, cache
