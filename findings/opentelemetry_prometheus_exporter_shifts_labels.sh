#!/usr/bin/env bash
# opentelemetry-exporter-prometheus 0.66b2: two meters may each have an instrument of the same name, with attributes of
# their own. The exporter makes one family of both and takes the label names from the first; the values of the second
# are written under these names, in sorted order. So a tool is reported as an agent, and with the default scope labels
# even the scope's name is shifted to another label. No warning is given.
# Seen: 'calls_total{agent="search"} 2.0', though "search" was the value of "tool".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opentelemetry-exporter-prometheus==0.66b2 opentelemetry-sdk==1.45.2 \
  prometheus-client==0.26.0
seen=$("$folder/venv/bin/python" - <<'PY'
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, generate_latest

for scope in (False, True):
    registry = CollectorRegistry()
    reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=scope, registry=registry)
    provider = MeterProvider(metric_readers=[reader])
    provider.get_meter("agents").create_counter("calls").add(1, {"agent": "planner"})
    provider.get_meter("tools").create_counter("calls").add(2, {"tool": "search"})
    print("\n".join(line for line in generate_latest(registry).decode().splitlines() if line.endswith("2.0")))
    provider.shutdown()
PY
)
echo "opentelemetry-exporter-prometheus 0.66b2, of calls {tool=search} of the meter tools:"
echo "$seen"
[ "$seen" = 'calls_total{agent="search"} 2.0
calls_total{agent="tools",otel_scope_name="",otel_scope_schema_url="",otel_scope_version="search"} 2.0' ]
