#!/usr/bin/env bash
# langchain-core 1.8.3: a chat model reports the errors of `ainvoke` after an asyncio.gather, which a cancellation leaves
# at once (language_models/chat_models.py, agenerate). Then neither on_llm_error nor on_llm_end is called, whereas the
# chain around the model, and a cancelled `astream`, report the cancellation. Handlers keep the run open for ever.
# Seen: "chain start, model start, chain CancelledError".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langchain-core==1.8.3
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda


class Shows(AsyncCallbackHandler):
    def __init__(self):
        self.seen, self.began = [], asyncio.Event()

    async def on_chain_start(self, *args, **kwargs):
        if kwargs["parent_run_id"] is None:
            self.seen.append("chain start")

    async def on_chat_model_start(self, serialized, messages, **kwargs):
        self.seen.append("model start")
        self.began.set()

    async def on_chain_error(self, error, **kwargs):
        self.seen.append(f"chain {type(error).__name__}")

    async def on_llm_error(self, error, **kwargs):
        self.seen.append(f"model {type(error).__name__}")

    async def on_llm_end(self, response, **kwargs):
        self.seen.append("model end")


class Waits(FakeListChatModel):
    async def _agenerate(self, *args, **kwargs):
        await asyncio.sleep(60)


async def main():
    shows = Shows()
    chain = RunnableLambda(lambda x: x) | Waits(responses=["x"])
    call = asyncio.create_task(chain.ainvoke("hi", config={"callbacks": [shows]}))
    await shows.began.wait()
    await asyncio.sleep(0.2)
    call.cancel()
    await asyncio.wait([call])
    await asyncio.sleep(0.2)
    print(", ".join(shows.seen))


asyncio.run(main())
PY
)
echo "$seen"
[ "$seen" = "chain start, model start, chain CancelledError" ]
