#!/usr/bin/env bash
# langgraph-checkpoint 4.3.2: RedisCache joins the parts of a namespace with colons and does not escape them, so two
# namespaces may share one key, and a read of one returns the value of the other. InMemoryCache keeps them apart. Also,
# clear([("a",)]) clears ("a", "b") there, and not in InMemoryCache.
# Seen: "InMemoryCache: None, kept; RedisCache: 1, cleared".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langgraph-checkpoint==4.3.2 fakeredis==2.41.0
seen=$("$folder/venv/bin/python" - <<'PY'
import fakeredis
from langgraph.cache.memory import InMemoryCache
from langgraph.cache.redis import RedisCache


def seen(cache):
    cache.set({(("a", "b"), "k"): (1, None)})
    other = cache.get([(("a:b",), "k")])
    cache.clear([("a",)])
    kept = cache.get([(("a", "b"), "k")])
    return f"{next(iter(other.values()), None)}, {'kept' if kept else 'cleared'}"


print(f"InMemoryCache: {seen(InMemoryCache())}; RedisCache: {seen(RedisCache(fakeredis.FakeRedis()))}")
PY
)
echo "$seen"
[ "$seen" = "InMemoryCache: None, kept; RedisCache: 1, cleared" ]
