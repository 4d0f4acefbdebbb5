#!/usr/bin/env bash
# py-cachify 3.1.0: init_cachify(is_global=False) returns an instance with a client of its own. As a decorator,
# instance.lock() takes the lock at the global client, while is_locked() and release() of the decorated function ask the
# instance's client. So is_locked() is False while the function runs. instance.once() and a global lock do it right.
# Seen: "instance.lock: is_locked False; instance.once: is_locked True; global lock: is_locked True".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet py-cachify==3.1.0
seen=$("$folder/venv/bin/python" - <<'PY'
from py_cachify import init_cachify, lock

init_cachify()
instance = init_cachify(is_global=False, prefix="OWN-")


def seen_inside(decorator):
    @decorator
    def job(number):
        return job.is_locked(number)

    return f"is_locked {job(1)}"


print(f"instance.lock: {seen_inside(instance.lock(key='a-{number}'))}", end="; ")
print(f"instance.once: {seen_inside(instance.once(key='b-{number}'))}", end="; ")
print(f"global lock: {seen_inside(lock(key='c-{number}'))}")
PY
)
echo "py-cachify 3.1.0, asked while the function runs: $seen"
[ "$seen" = "instance.lock: is_locked False; instance.once: is_locked True; global lock: is_locked True" ]
