#!/usr/bin/env bash
# opentelemetry-sdk 1.45.2: AlwaysRecordSampler lets span processors see the spans that its root sampler drops, so that
# a processor can count all spans whatever the sampling rate. Its result is documented as functionally equivalent except
# for the decision. But the samplers of the SDK return no attributes for a span that they drop, and AlwaysRecordSampler
# passes on the attributes of that result. The recorded span therefore lacks the attributes given at its start.
# Seen: with ALWAYS_ON, the processor sees {'user.tier': 'gold'}; with AlwaysRecordSampler(ALWAYS_OFF), it sees {}.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opentelemetry-sdk==1.45.2
seen=$("$folder/venv/bin/python" - <<'PY'
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, AlwaysRecordSampler

found = []


class Seen(SpanProcessor):
    def on_end(self, span):
        found.append(dict(span.attributes))


for sampler in (ALWAYS_ON, AlwaysRecordSampler(ALWAYS_OFF)):
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(Seen())
    provider.get_tracer("t").start_span("work", attributes={"user.tier": "gold"}).end()
assert found[0] == {"user.tier": "gold"} and len(found) == 2, found
print("lost" if found[1] == {} else "kept")
PY
)
echo "opentelemetry-sdk 1.45.2, attributes of a span recorded by AlwaysRecordSampler: $seen"
[ "$seen" = lost ]
