#!/usr/bin/env bash
# langchain-core 1.8.3: RunnableWithFallbacks makes a config for its children, then passes its own config to them
# (runnables/fallbacks.py, invoke and ainvoke). So the runs of the model and of its fallback are not within the run of
# the fallbacks, but beside it: here they are further root runs, and a tracer shows three traces for one call.
# Seen: "chain of None, model of None, model of None".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langchain-core==1.8.3
seen=$("$folder/venv/bin/python" - <<'PY'
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel as Model


class Fails(Model):
    def _call(self, *args, **kwargs):
        raise ConnectionError


class Shows(BaseCallbackHandler):
    def __init__(self):
        self.seen = []

    def on_chain_start(self, *args, parent_run_id=None, **kwargs):
        self.seen.append(f"chain of {parent_run_id}")

    def on_chat_model_start(self, serialized, messages, *, parent_run_id=None, **kwargs):
        self.seen.append(f"model of {parent_run_id}")


shows = Shows()
Fails(responses=[""]).with_fallbacks([Model(responses=["x"])]).invoke("hi", config={"callbacks": [shows]})
print(", ".join(shows.seen))
PY
)
echo "$seen"
[ "$seen" = "chain of None, model of None, model of None" ]
