#!/usr/bin/env bash
# cashews 7.6.0, in-memory backend: set() without expire keeps the expiry time of the key's previous value, also if that
# has passed. So a value that is set after the previous one expired is lost at once, until the cleaner, which runs once
# a second, has removed the old one; and a permanent value set before the expiry is lost when the old one would expire.
# In Redis, and with the library's Redis backend, a plain set has no expiry.
# Seen: "set after expiry: None; set before expiry: None; fresh key: new".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cashews==7.6.0
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio

from cashews import Cache


async def main():
    cache = Cache()
    cache.setup("mem://?check_interval=3600")
    await cache.set("after", "old", expire=0.2)
    await cache.set("before", "old", expire=0.2)
    await cache.set("before", "new")
    await asyncio.sleep(0.4)
    await cache.set("after", "new")
    await cache.set("fresh", "new")
    after, before, fresh = [await cache.get(key) for key in ("after", "before", "fresh")]
    print(f"set after expiry: {after}; set before expiry: {before}; fresh key: {fresh}")


asyncio.run(main())
PY
)
echo "cashews 7.6.0: $seen"
[ "$seen" = "set after expiry: None; set before expiry: None; fresh key: new" ]
