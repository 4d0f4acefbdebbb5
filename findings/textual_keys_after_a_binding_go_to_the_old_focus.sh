#!/usr/bin/env bash
# textual 8.2.8: when a key runs a binding that moves the focus to an input, the keys typed right after it are lost. The
# app forwards each key to the widget that has the focus when the key arrives, and a binding runs only after its key has
# bubbled up from that widget. So keys that arrive together, as with fast typing or a paste, go to the old focus. With
# `priority=True`, the binding runs before the next key is forwarded, and no key is lost.
# Seen: "plain: '', priority: 'abc'".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet textual==8.2.8
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio

from textual import events
from textual.app import App
from textual.binding import Binding
from textual.widgets import Button, Input


async def typed(priority):
    class Search(App):
        BINDINGS = [Binding("slash", "search", priority=priority)]

        def compose(self):
            yield Button("a widget that has the focus")
            yield Input()

        def action_search(self):
            self.screen.set_focus(self.query_one(Input))

    app = Search()
    async with app.run_test() as pilot:
        for key, character in (("slash", "/"), ("a", "a"), ("b", "b"), ("c", "c")):
            app.post_message(events.Key(key, character))  # as the driver does when four keys arrive together
        await pilot.pause(1)
        return app.query_one(Input).value


print(f"plain: {asyncio.run(typed(False))!r}, priority: {asyncio.run(typed(True))!r}")
PY
)
echo "$seen"
[ "$seen" = "plain: '', priority: 'abc'" ]
