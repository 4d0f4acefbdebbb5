#!/usr/bin/env bash
# coredis 6.9.0: LRUCache(max_keys=-1) is documented as unbounded. But put() evicts a key whenever the number of keys is
# not below max_keys, which -1 never allows: the client-side cache holds the last key only, and nearly all reads miss.
# Seen: "max_keys 1000: 3 hits, 0 misses; max_keys -1: 1 hits, 2 misses".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet coredis==6.9.0
seen=$("$folder/venv/bin/python" - <<'PY'
import contextlib

from coredis.patterns.cache import LRUCache


def seen(max_keys):
    cache = LRUCache(max_keys=max_keys)
    for key in "abc":
        cache.put(b"GET", key, value=key)
    for key in "abc":
        with contextlib.suppress(KeyError):
            cache.get(b"GET", key)
    return f"max_keys {max_keys}: {cache.stats.summary['hits']} hits, {cache.stats.summary['misses']} misses"


print(f"{seen(1000)}; {seen(-1)}")
PY
)
echo "coredis 6.9.0: $seen"
[ "$seen" = "max_keys 1000: 3 hits, 0 misses; max_keys -1: 1 hits, 2 misses" ]
