#!/usr/bin/env bash
# cacheout 0.17.0: memoize() makes its key of the hashes of the arguments, and never compares the arguments themselves.
# In CPython hash(-1) == hash(-2), so a call with -2 returns the cached result for -1, also with typed=True and as one
# of several arguments. functools.lru_cache keeps the two apart.
# Seen: "-1 -> -10, -2 -> -10; typed: -2 -> -10; shift(5, -2) -> 4; lru_cache: -2 -> -20".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cacheout==0.17.0
seen=$("$folder/venv/bin/python" - <<'PY'
import functools

import cacheout


def tenfold(number):
    return 10 * number


def shift(position, offset):
    return position + offset


plain = cacheout.Cache().memoize()(tenfold)
typed = cacheout.Cache().memoize(typed=True)(tenfold)
pair = cacheout.lru_memoize()(shift)
known = functools.lru_cache(tenfold)
typed(-1), pair(5, -1), known(-1)
print(f"-1 -> {plain(-1)}, -2 -> {plain(-2)}; typed: -2 -> {typed(-2)}; shift(5, -2) -> {pair(5, -2)};", end=" ")
print(f"lru_cache: -2 -> {known(-2)}")
PY
)
echo "cacheout 0.17.0: $seen"
[ "$seen" = "-1 -> -10, -2 -> -10; typed: -2 -> -10; shift(5, -2) -> 4; lru_cache: -2 -> -20" ]
