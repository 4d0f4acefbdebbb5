#!/usr/bin/env bash
# theine 2.0.0: Cache.stats() advances the counters that it reads, once per shard (16 to 128, by the number of CPUs).
# The first result is right; each later one contains hits and misses that never happened. The README says to call
# stats() again for updated numbers.
# Seen: five lookups of a missing key are 5 requests and 0 hits; read again at once, they are more, and with hits.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet theine==2.0.0 theine-core==2.1.0
seen=$("$folder/venv/bin/python" - <<'PY'
import sys

from theine import Cache

cache = Cache(100)
for _ in range(5):
    assert cache.get("missing") == (None, False)
first, second = cache.stats(), cache.stats()
print(f"first: {first.request_count} requests, {first.hit_count} hits; second:", end=" ")
print("more requests, with hits" if second.request_count > 5 and second.hit_count > 0 else "the same")
print(second.request_count, "requests,", second.hit_count, "hits the second time", file=sys.stderr)
PY
)
echo "theine 2.0.0: $seen"
[ "$seen" = "first: 5 requests, 0 hits; second: more requests, with hits" ]
