#!/usr/bin/env bash
# strands-agents 1.62.0: an AgentResult has the metrics of all calls of the agent so far, not of its own call. So of two
# equal calls, the result of the second reports twice as many tokens as the result of the first.
# Seen: "first result: 15 tokens; second result: 30 tokens".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet strands-agents==1.62.0
seen=$("$folder/venv/bin/python" - <<'PY'
import logging

from strands import Agent
from strands.models import Model

logging.disable()


class Fixed(Model):
    """Answers "x", and reports 10 input tokens and 5 output tokens."""

    def update_config(self, **config): ...

    def get_config(self):
        return {}

    async def structured_output(self, *args, **kwargs):
        raise NotImplementedError
        yield

    async def stream(self, *args, **kwargs):
        yield {"messageStart": {"role": "assistant"}}
        yield {"contentBlockStart": {"start": {}}}
        yield {"contentBlockDelta": {"delta": {"text": "x"}}}
        yield {"contentBlockStop": {}}
        yield {"messageStop": {"stopReason": "end_turn"}}
        usage = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}
        yield {"metadata": {"usage": usage, "metrics": {"latencyMs": 1}}}


agent = Agent(model=Fixed(), callback_handler=None)
first = agent("hi").metrics.accumulated_usage["totalTokens"]
second = agent("hi").metrics.accumulated_usage["totalTokens"]
print(f"first result: {first} tokens; second result: {second} tokens")
PY
)
echo "$seen"
[ "$seen" = "first result: 15 tokens; second result: 30 tokens" ]
