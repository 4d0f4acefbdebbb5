#!/usr/bin/env bash
# gunicorn 27.0.1 with gevent 26.9.0: at SIGINT or SIGQUIT, about one gevent worker in ten does not finish its exit
# handlers. The worker's handler of SIGQUIT sets `alive = False` and waits in a greenlet for 0.1 s before it raises
# SystemExit in the main greenlet. The main loop looks at `alive` once a second. If it does so during these 0.1 s, the
# worker ends in order and its `atexit` functions run, until the SystemExit of the greenlet interrupts one of them. A
# function that waits for the network, such as one that sends buffered records, is cut off. The exit code is 0.
# Seen: of up to 80 workers, some began their exit function and did not finish it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'gunicorn[gevent]==27.0.1' gevent==26.9.0 packaging==25.0
cat >"$folder/app.py" <<'PY'
import atexit
import os
import time


def at_exit():
    os.write(1, b"began\n")
    time.sleep(0.5)
    os.write(1, b"finished\n")


atexit.register(at_exit)


def app(environ, start):
    start("200 OK", [("Content-Length", "2")])
    return [b"ok"]
PY
seen=$(cd "$folder" && HOME=$folder "$folder/venv/bin/python" - <<'PY'
import signal
import subprocess
import sys

WORKERS = 16
began = finished = 0
for _ in range(5):
    words = [sys.executable, "-m", "gunicorn", "app:app", "-k", "gevent", "-w", str(WORKERS), "-b", "127.0.0.1:0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ready = 0
    for line in server.stderr:
        ready += "Booting worker" in line
        if ready == WORKERS:
            break
    try:
        server.wait(5)  # until the last worker serves requests
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGINT)
    said = server.communicate(timeout=60)[0].split()
    began += said.count("began")
    finished += said.count("finished")
    if finished < began:
        break
print(f"{began} began {'all' if finished == began else 'fewer'} finished", file=sys.stderr)
print("some were cut off" if began >= WORKERS and finished < began else "all finished")
PY
)
echo "gunicorn 27.0.1, exit functions of gevent workers at SIGINT: $seen"
[ "$seen" = "some were cut off" ]
