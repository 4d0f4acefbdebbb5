#!/usr/bin/env bash
# openinference-instrumentation-openai 0.1.66: a streamed call of the Responses API that stops at max_output_tokens ends
# with the event response.incomplete, which carries the output and the usage, as response.completed does. The span takes
# them only from response.completed, so it has no token counts, and its status is OK. The same call
# without streaming has them.
# Seen: "completed: 26, streamed 26; incomplete: 26, streamed None".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openinference-instrumentation-openai==0.1.66 openai==3.57.0 \
  opentelemetry-sdk==1.45.2
seen=$("$folder/venv/bin/python" - <<'PY'
import json

import httpx2 as httpx
import openai
from openinference.instrumentation.openai import OpenAIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
OpenAIInstrumentor().instrument(tracer_provider=provider)


def respond(status, streamed):
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    text = {"type": "output_text", "text": "half a", "annotations": []}
    message = {"type": "message", "id": "m", "status": status, "role": "assistant", "content": [text]}
    usage = {"input_tokens": 10, "output_tokens": 16, "total_tokens": 26}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    response = {"id": "r", "object": "response", "created_at": 1, "model": "gpt-5", "status": status, "error": None}
    response |= {"incomplete_details": reason, "instructions": None, "output": [message], "usage": usage, "tools": []}
    response |= {"parallel_tool_calls": True, "tool_choice": "auto", "metadata": {}, "temperature": 1, "top_p": 1}
    if not streamed:
        return httpx.Response(200, json=response)
    event = {"type": f"response.{status}", "sequence_number": 0, "response": response}
    body = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)


def tokens(status, streamed):
    transport = httpx.MockTransport(lambda request: respond(status, streamed))
    client = openai.OpenAI(api_key="none", http_client=httpx.Client(transport=transport))
    result = client.responses.create(model="gpt-5", input="hi", max_output_tokens=16, stream=streamed)
    if streamed:
        assert [event.response.usage.total_tokens for event in result] == [26]
    (span,) = spans.get_finished_spans()
    spans.clear()
    assert span.status.status_code.name == "OK"
    return span.attributes.get("llm.token_count.total")


print("; ".join(f"{s}: {tokens(s, False)}, streamed {tokens(s, True)}" for s in ("completed", "incomplete")))
PY
)
echo "openinference-instrumentation-openai 0.1.66, total tokens of the span: $seen"
[ "$seen" = "completed: 26, streamed 26; incomplete: 26, streamed None" ]
