#!/usr/bin/env bash
# langchain-openai 1.7.4 (langchain-core 1.8.3, openai 3.57.0): a chat completion with n=2 has one usage for the request,
# but each of the two generations carries the whole usage. A sum over generations counts every token twice.
# Seen: "usage of the response: 120; sum over generations: 240".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langchain-openai==1.7.4 langchain-core==1.8.3 openai==3.57.0
seen=$("$folder/venv/bin/python" - <<'PY'
import httpx
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}} for i in range(2)]
answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "gpt-x", "choices": choices, "usage": usage}
transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
model = ChatOpenAI(model="gpt-x", api_key="none", n=2, http_client=httpx.Client(transport=transport))
generations = model.generate([[HumanMessage("hi")]]).generations[0]
total = sum(each.message.usage_metadata["total_tokens"] for each in generations)
print(f"usage of the response: {usage['total_tokens']}; sum over generations: {total}")
PY
)
echo "$seen"
[ "$seen" = "usage of the response: 120; sum over generations: 240" ]
