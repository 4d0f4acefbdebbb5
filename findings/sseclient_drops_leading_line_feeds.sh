#!/usr/bin/env bash
# sseclient 0.0.27: the data of an event are its "data" lines, joined by line feeds. The parser joins only if it already
# has some text, so empty lines at the start are dropped. A model that streams its text by token sends many tokens that
# begin with a line feed or consist of them: paragraphs and lists run together. Its own dump() writes these lines.
# Seen: "a" + "\n\n" + "\n- b" arrive as "a- b".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sseclient==0.0.27
seen=$("$folder/venv/bin/python" - <<'PY'
import sseclient

tokens = ["a", "\n\n", "\n- b"]
events = [sseclient.Event(data=token).dump() for token in tokens]
assert events[2] == "data: \ndata: - b\n\n", events
print(repr("".join(tokens)), "->", repr("".join(sseclient.Event.parse(event).data for event in events)))
PY
)
echo "sseclient 0.0.27: $seen"
[ "$seen" = "'a\n\n\n- b' -> 'a- b'" ]
