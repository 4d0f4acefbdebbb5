#!/usr/bin/env bash
# opentelemetry-instrumentation-anthropic 0.62.4: the usage in the event message_delta is cumulative, as the type in the
# client says. The instrumentation adds it to the usage of message_start, so a streamed answer has too many output
# tokens in its span: those of message_start are counted twice.
# Seen: "client: 20; span: 28", for 8 output tokens in message_start and 20 in message_delta.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opentelemetry-instrumentation-anthropic==0.62.4 anthropic==2.14.0 \
  opentelemetry-sdk==1.45.2
seen=$("$folder/venv/bin/python" - <<'PY'
import json

import anthropic
import httpx2 as httpx
from opentelemetry.instrumentation.anthropic import AnthropicInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
AnthropicInstrumentor().instrument(tracer_provider=provider)
message = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "claude-x"}
message |= {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 10, "output_tokens": 8}}
end = {"stop_reason": "end_turn", "stop_sequence": None}
events = [
    {"type": "message_start", "message": message},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": end, "usage": {"output_tokens": 20}},
    {"type": "message_stop"},
]
body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)
transport = httpx.MockTransport(lambda request: answer)
client = anthropic.Anthropic(api_key="none", http_client=httpx.Client(transport=transport))
question = [{"role": "user", "content": "hi"}]
with client.messages.stream(model="claude-x", max_tokens=100, messages=question) as stream:
    usage = stream.get_final_message().usage
(span,) = spans.get_finished_spans()
print(f"client: {usage.output_tokens}; span: {span.attributes['gen_ai.usage.output_tokens']}")
PY
)
echo "opentelemetry-instrumentation-anthropic 0.62.4, output tokens: $seen"
[ "$seen" = "client: 20; span: 28" ]
