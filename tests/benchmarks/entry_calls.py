"""Calls a cache of the checkout that PYTHONPATH names: the other half of `entries`, which compares two checkouts.

`python entry_calls.py URL NAMESPACE ENTRIES CALLS` reads lines "<kind> <work>" and answers each with "done".
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache

KINDS = ("LRU", "tinylfu", "tiered")
TTL_S = 300
VALUE = "x" * 200


def make(kind: str, entries: int, backend: Backend) -> LRUCache | TieredCache:
    """Return a cache that is full after `entries` puts."""
    if kind == "LRU":
        return LRUCache(entries, name="entries", default_ttl=TTL_S, backend=backend)
    if kind == "tinylfu":
        return LRUCache(entries, name="entries-tinylfu", policy=kind, default_ttl=TTL_S, backend=backend)
    hot, warm = entries // 100, entries // 10
    ttls = {"hot_ttl": TTL_S, "warm_ttl": TTL_S, "cold_ttl": TTL_S}
    sizes = {"hot_size": hot, "warm_size": warm, "cold_size": entries - hot - warm}
    return TieredCache(name="entries", backend=backend, **sizes, **ttls)  # type: ignore[arg-type]


def main() -> None:
    """Run the work from stdin, line by line. All calls of a line are one pipeline, which wakes the server only once."""
    url, namespace, entries, calls = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    backend = Backend(url, namespace=namespace)
    caches: dict[str, Any] = {kind: make(kind, entries, backend) for kind in KINDS}
    numbers = itertools.count(entries)
    runner = asyncio.Runner()

    def gathered(call: Callable[..., Any], keys: list[str], *args: Any) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(call(key, *args) for key in keys))

        runner.run(all_of_them())

    for line in sys.stdin:
        kind, work = line.split()
        cache = caches[kind]
        if work == "fill":
            cache.put_many({f"key{number:06d}": VALUE for number in range(entries)})
            # Until an entry of the cache has expired, no write looks for expired entries. In most caches in use, some
            # entries have expired. So let one entry expire here.
            cache.put("soon over", 1, ttl=0.001)
            time.sleep(0.01)
            cache.put("next", 1)
        known = cache.keys()[-calls:]
        if work == "hit":
            gathered(cache.aio.get, known)
        elif work == "put":
            cache.put_many({f"key{next(numbers):06d}": VALUE for _ in range(calls)})
        elif work == "replace":
            cache.put_many(dict.fromkeys(known, VALUE))
        elif work == "touch":
            gathered(cache.aio.touch, known, TTL_S)
        cache.flush()
        print("done", flush=True)


if __name__ == "__main__":
    main()
