#!/usr/bin/env bash
# apprise 2.3.0: all Apprise objects of a process share one pool of cpu_count + 4 threads, also objects with a single
# service each. While that many services do not answer, a notification of another object to a healthy service is not
# sent: it waits for a thread until one of the hung services gives up, here after 20 s (rto=20).
# Seen: the healthy service got its notification after about 20 s, and by the plugin's own notify in well under 5 s.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apprise==2.3.0
seen=$("$folder/venv/bin/python" - <<'PY'
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import apprise

RTO_S = 20
silent = socket.create_server(("127.0.0.1", 0), backlog=100)  # it accepts connections and never answers


class Healthy(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


healthy = ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
threading.Thread(target=healthy.serve_forever, daemon=True).start()
url = f"json://127.0.0.1:{healthy.server_address[1]}"
hung = f"json://127.0.0.1:{silent.getsockname()[1]}?rto={RTO_S}&retry=0"


def notify(address):
    sender = apprise.Apprise()
    sender.add(address)
    return sender.notify(body="x")


notify(url)  # loads the plugins
for _ in range(os.cpu_count() + 4):
    threading.Thread(target=notify, args=(hung,), daemon=True).start()
time.sleep(2)
start = time.monotonic()
assert apprise.Apprise.instantiate(url).notify(body="x")
direct = time.monotonic() - start
start = time.monotonic()
assert notify(url)
print("late" if time.monotonic() - start > RTO_S / 2 > direct else "on time", flush=True)
os._exit(0)
PY
)
echo "apprise 2.3.0, a healthy service beside hung ones: $seen"
[ "$seen" = late ]
