#!/usr/bin/env bash
# aioprometheus 23.12.0: the text formatter writes label values as they are. The format requires \\, \" and \n for a
# backslash, a quote and a line end. A quote in one label value makes the whole page unreadable, so that all metrics of
# the process are lost, and C:\new is read as "C:", a line end and "ew".
# Seen: "quote: page refused; backslash: C:<line end>ew; prometheus-client: C:\new".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet aioprometheus==23.12.0 prometheus-client==0.26.0
seen=$("$folder/venv/bin/python" - <<'PY'
import prometheus_client
from aioprometheus import Counter
from aioprometheus.collectors import Registry
from aioprometheus.formats.text import TextFormatter
from prometheus_client.parser import text_string_to_metric_families


def read(page):
    try:
        (sample,) = [s for family in text_string_to_metric_families(page) for s in family.samples if "total" in s.name]
    except ValueError:
        return "page refused"
    return sample.labels["path"].replace("\n", "<line end>")


def written(path):
    registry = Registry()
    Counter("requests_total", "Requests", registry=registry).inc({"path": path})
    return TextFormatter().marshall(registry).decode()


other = prometheus_client.CollectorRegistry()
prometheus_client.Counter("requests_total", "Requests", ["path"], registry=other).labels("C:\\new").inc()
print(f'quote: {read(written("a" + chr(34) + "b"))}; backslash: {read(written("C:" + chr(92) + "new"))};', end=" ")
print(f"prometheus-client: {read(prometheus_client.generate_latest(other).decode())}")
PY
)
echo "aioprometheus 23.12.0: $seen"
[ "$seen" = 'quote: page refused; backslash: C:<line end>ew; prometheus-client: C:\new' ]
