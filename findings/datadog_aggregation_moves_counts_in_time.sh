#!/usr/bin/env bash
# datadog 0.56.0: count_with_timestamp() and gauge_with_timestamp() give a value the time for which it holds. With
# client-side aggregation, values of one name and tags are merged whatever their times: all counts are reported at the
# time of the first, and of the gauges only the last value, at the time of the first.
# Seen, for values 5 and, an hour later, 7: "calls:12|c|T1700000000", "load:7|g|T1700000000".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datadog==0.56.0
seen=$("$folder/venv/bin/python" - "$folder/s" <<'PY'
import contextlib
import socket
import sys

from datadog.dogstatsd import DogStatsd

server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind(sys.argv[1])
server.settimeout(0.5)
for aggregated in (False, True):
    options = {"disable_aggregation": not aggregated, "disable_telemetry": True, "flush_interval": 60}
    client = DogStatsd(socket_path=sys.argv[1], **options)
    for value, timestamp in ((5, 1700000000), (7, 1700003600)):
        client.count_with_timestamp("calls", value, timestamp)
        client.gauge_with_timestamp("load", value, timestamp)
    if aggregated:
        client.flush_aggregated_metrics()
    client.stop()
    packets = []
    with contextlib.suppress(TimeoutError):
        while True:
            packets += server.recv(9999).decode().split()
    print(f"{'aggregated' if aggregated else 'each'}: {', '.join(sorted(packets))}")
PY
)
echo "datadog 0.56.0:"
echo "$seen"
[ "$seen" = "each: calls:5|c|T1700000000, calls:7|c|T1700003600, load:5|g|T1700000000, load:7|g|T1700003600
aggregated: calls:12|c|T1700000000, load:7|g|T1700000000" ]
