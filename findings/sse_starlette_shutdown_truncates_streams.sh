#!/usr/bin/env bash
# sse-starlette 3.7.0 with uvicorn 0.54.0: at SIGTERM, an open EventSourceResponse is cancelled instead of ended. So the
# chunked body lacks its last chunk (http.client raises IncompleteRead), and uvicorn logs for each open stream, as an
# error: "ASGI callable returned without completing response." A StreamingResponse whose generator returns ends in
# order. A generator that watches `shutdown_event` ends in order too.
# Seen: the client got an incomplete body, and the log of a normal end had the error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sse-starlette==3.7.0 starlette==1.10.0 uvicorn==0.54.0
cat >"$folder/app.py" <<'PY'
import asyncio

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route


async def events():
    yield {"data": "first"}
    await asyncio.sleep(3600)


async def stream(request):
    return EventSourceResponse(events())


app = Starlette(routes=[Route("/", stream)])
PY
seen=$(cd "$folder" && "$folder/venv/bin/python" - <<'PY'
import http.client
import subprocess
import sys
import time

words = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0", "--log-level", "info"]
server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
for line in server.stderr:
    if "running on" in line:
        port = int(line.rpartition("127.0.0.1:")[2].split()[0])
        break
client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
client.request("GET", "/")
reply = client.getresponse()
assert b"first" in reply.readline()
server.terminate()
try:
    reply.read()
    body = "complete"
except http.client.IncompleteRead:
    body = "incomplete"
log = server.stderr.read()
server.wait(30)
print(body, "error logged" if "returned without completing response" in log else "no error")
PY
)
echo "sse-starlette 3.7.0, open stream at SIGTERM: $seen"
[ "$seen" = "incomplete error logged" ]
