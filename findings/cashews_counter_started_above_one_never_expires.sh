#!/usr/bin/env bash
# cashews 7.6.0: incr(key, value, expire=seconds) sets the expiry only if the new count is 1, which stands for "the key
# is new". A counter whose first increment is larger, such as tokens or bytes per minute, never expires, so a quota that
# is counted with it is used up for ever. Seen in memory; the script of the Redis backend has the same comparison.
# Seen: "first increment 1: expires in 60 s; first increment 5: never".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cashews==7.6.0
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio

from cashews import Cache


async def main():
    cache = Cache()
    cache.setup("mem://")
    parts = []
    for amount in (1, 5):
        assert await cache.incr(f"tokens-{amount}", amount, expire=60) == amount
        left = await cache.get_expire(f"tokens-{amount}")
        parts.append(f"first increment {amount}: {'never' if left == -1 else f'expires in {left} s'}")
    print("; ".join(parts))


asyncio.run(main())
PY
)
echo "cashews 7.6.0: $seen"
[ "$seen" = "first increment 1: expires in 60 s; first increment 5: never" ]
