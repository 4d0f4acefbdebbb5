#!/usr/bin/env bash
# langchain-core 1.8.3: UsageMetadataCallbackHandler adds up usage by response_metadata["model_name"]. A message whose
# metadata names the model under "model" instead is silently left out.
# Seen: "under model_name: 15 tokens; under model: {}".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langchain-core==1.8.3
seen=$("$folder/venv/bin/python" - <<'PY'
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage


def counted(metadata):
    handler = UsageMetadataCallbackHandler()
    message = AIMessage(
        "x", usage_metadata={"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}, response_metadata=metadata
    )
    GenericFakeChatModel(messages=iter([message])).invoke("hi", config={"callbacks": [handler]})
    return handler.usage_metadata


named = counted({"model_name": "claude-x"})
print(f"under model_name: {named['claude-x']['total_tokens']} tokens; under model: {counted({'model': 'claude-x'})}")
PY
)
echo "$seen"
[ "$seen" = "under model_name: 15 tokens; under model: {}" ]
