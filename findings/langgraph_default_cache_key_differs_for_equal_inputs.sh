#!/usr/bin/env bash
# langgraph 1.2.24: CachePolicy's default key is a hash of the pickled input. Pickle writes a repeated object once, but
# equal objects each time, so equal inputs have different keys: here two equal strings in a state that came from JSON,
# as from a checkpoint or a request, against the same text as one object. The cached node runs again.
# Seen: "equal inputs: True, equal keys: False, runs of the node: 2".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langgraph==1.2.24
seen=$("$folder/venv/bin/python" - <<'PY'
import json
from typing import TypedDict
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import START, StateGraph
from langgraph.types import CachePolicy


class State(TypedDict):
    first: str
    last: str


runs = []
graph = StateGraph(State)
graph.add_node("node", lambda state: runs.append(1) or {}, cache_policy=CachePolicy())
graph.add_edge(START, "node")
graph = graph.compile(cache=InMemoryCache())
text = "a question"
one = {"first": text, "last": text}
two = json.loads(json.dumps(one))
for state in (one, two):
    graph.invoke(state)
key = CachePolicy().key_func
print(f"equal inputs: {one == two}, equal keys: {key(one) == key(two)}, runs of the node: {len(runs)}")
PY
)
echo "$seen"
[ "$seen" = "equal inputs: True, equal keys: False, runs of the node: 2" ]
