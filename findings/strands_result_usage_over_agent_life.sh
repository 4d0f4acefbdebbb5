#!/usr/bin/env bash
# strands-agents 1.62.0: the metrics of an AgentResult are those of the agent over its whole life. The second of two
# equal calls says that it used twice as many tokens as the first.
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
    """Answers "x", and says that this took 10 tokens in and 5 out."""

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
