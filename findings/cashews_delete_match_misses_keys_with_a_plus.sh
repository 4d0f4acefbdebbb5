#!/usr/bin/env bash
# cashews 7.6.0, in-memory backend: delete_match() and scan() take a pattern with "*", as Redis does. In memory, the
# pattern becomes a regular expression in which only "*" is translated. So "cart:ann+shop@example.org:*" deletes
# nothing, since the plus repeats the letter before it, and "price:EUR(net):*" deletes nothing, while "v1.0:*" also
# deletes the keys of v1x0.
# Seen: left are "cart:ann+shop@example.org:1", "price:EUR(net):1"; gone is "v1x0:1".
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
    keys = ["cart:ann+shop@example.org:1", "price:EUR(net):1", "v1.0:1", "v1x0:1", "plain:1"]
    await cache.set_many(dict.fromkeys(keys, "value"))
    for pattern in ("cart:ann+shop@example.org:*", "price:EUR(net):*", "v1.0:*", "plain:*"):
        await cache.delete_match(pattern)
    left = [key for key in keys if await cache.exists(key)]
    print(*left)


asyncio.run(main())
PY
)
echo "cashews 7.6.0, left of five keys, four of which were to be deleted: $seen"
[ "$seen" = "cart:ann+shop@example.org:1 price:EUR(net):1" ]
