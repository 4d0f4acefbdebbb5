#!/usr/bin/env bash
# py-cachify 3.1.0: a pool remembers the slot of the current context in one variable. If code that holds a slot enters
# the same pool again, as when one pooled function calls another, the inner exit clears the variable, and the outer exit
# releases nothing. The slot stays taken until it expires, by default after ten minutes, and the pool soon is full.
# Seen: "size after one block: 0; after nested blocks: 1; after two more: 3, and the next is refused".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet py-cachify==3.1.0
seen=$("$folder/venv/bin/python" - <<'PY'
from py_cachify import CachifyPoolFullError, init_cachify, pool

init_cachify()
workers = pool(key="workers", max_size=4)


def nested():
    with workers, workers:
        assert workers.size() >= 2


with workers:
    pass
print(f"size after one block: {workers.size()}", end="; ")
nested()
print(f"after nested blocks: {workers.size()}", end="; ")
nested()
nested()
print(f"after two more: {workers.size()}", end=", and the next is ")
try:
    nested()
    print("accepted")
except CachifyPoolFullError:
    print("refused")
PY
)
echo "py-cachify 3.1.0: $seen"
[ "$seen" = "size after one block: 0; after nested blocks: 1; after two more: 3, and the next is refused" ]
