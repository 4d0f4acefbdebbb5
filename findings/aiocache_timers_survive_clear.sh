#!/usr/bin/env bash
# aiocache 0.12.3, in-memory cache: clear() forgets the expiry timers instead of cancelling them. A timer of a cleared
# entry then deletes the value that was set for the same key afterwards, though that value has a longer TTL.
# After delete() instead of clear(), the new value stays.
# Seen: "after delete: new; after clear: None".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet aiocache==0.12.3
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio

from aiocache import SimpleMemoryCache


async def main():
    deleted, cleared = SimpleMemoryCache(), SimpleMemoryCache()
    for cache in (deleted, cleared):
        await cache.set("key", "old", ttl=0.2)
    await deleted.delete("key")
    await cleared.clear()
    for cache in (deleted, cleared):
        await cache.set("key", "new", ttl=60)
    await asyncio.sleep(0.5)
    print(f"after delete: {await deleted.get('key')}; after clear: {await cleared.get('key')}")


asyncio.run(main())
PY
)
echo "aiocache 0.12.3: $seen"
[ "$seen" = "after delete: new; after clear: None" ]
