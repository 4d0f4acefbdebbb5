"""Live pages: a page opens one connection, on which it gets its main part each time that part has changed.

All connections of the same page share one feed, which renders the page once per refresh interval. All feeds refresh at
the same times and share their reads (`Reader`). So the load on the namespace's Redis server does not grow with the
number of open pages.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Message, Scope

from agentperf_redis.web.security import is_inside, refusal
from agentperf_redis.web.templating import root_path

_log = logging.getLogger("agentperf_redis")

MAX_PAGES: Final = 500
"""Maximum number of open live pages. Any further page does not change until it is loaded again."""
MAX_SHARE: Final = 0.25
"""If rendering a page takes a larger share of the pause between two renderings, the pause is doubled."""
MAX_PAUSE_S: Final = 10.0
"""Maximum pause to which `MAX_SHARE` may lead, s."""
RETRY_MS: Final = 2000
"""How long a browser waits before it connects again."""
_PING_S = 15
"""Interval of pings, s. After this time at the latest, the server notices that a connection is closed."""
_SEND_TIMEOUT_S = 30.0
"""A client that does not read for this long is disconnected."""
_CLOSE_S = 0.5
"""How long a server that ends waits until its clients have received the end of the events."""
_MAIN = re.compile(r"<main\b.*?</main>", re.DOTALL)

Render = Callable[[], Awaitable[str]]


class Feed:
    """The main part of one page, rendered once per interval for all connections of the page.

    Args:
        render: renders the main part.
        interval_s: the refresh interval, s.
    """

    def __init__(self, render: Render, interval_s: float) -> None:
        self._render = render
        self._interval_s = interval_s
        self.readers = 0
        self.html = ""
        self.version = 0
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Render until cancelled. All feeds with the same pause render at the same times."""
        pause_s = self._interval_s
        while True:
            await asyncio.sleep(pause_s - time.monotonic() % pause_s)
            began = time.monotonic()
            try:
                html = await self._render()
            except Exception:  # noqa: BLE001  pages handle errors of the server, so this is a fault of the page
                _log.exception("a live page was not rendered")
                continue
            if html != self.html:
                self.html, self.version = html, self.version + 1
                self.changed.set()
                self.changed = asyncio.Event()
            pause_s = pause(self._interval_s, time.monotonic() - began)


def pause(interval_s: float, took_s: float) -> float:
    """Return the time between two renderings of a page: the interval times a power of two.

    A namespace of ten thousand agents takes seconds to read. The pause leaves most of the server's time to other work.
    """
    pause_s = interval_s
    while took_s > MAX_SHARE * pause_s and 2 * pause_s <= MAX_PAUSE_S:
        pause_s *= 2
    return pause_s


class Live:
    """The feeds of all open pages.

    Args:
        interval_s: the refresh interval, s.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._feeds: dict[Hashable, Feed] = {}
        self.pages = 0

    async def events(
        self, key: Hashable, render: Render, has_ended: Callable[[], bool], closing: anyio.Event
    ) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the main part of a page whenever it has changed.

        Args:
            key: identifies the result of `render`: equal keys mean equal results.
            render: renders the main part.
            has_ended: returns whether the login of the client has ended. If so, the events end too.
            closing: set when the web server ends. The events then end too.
        """
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = Feed(render, self._interval_s)
            feed.task = asyncio.create_task(feed.run(), name="agentperf-live")
        feed.readers += 1
        self.pages += 1
        try:
            version = 0
            while not (has_ended() or closing.is_set()):
                if feed.version == version:
                    await _first_of(feed.changed.wait(), closing.wait())
                    continue
                version = feed.version
                yield ServerSentEvent(feed.html, event="main", retry=RETRY_MS)
        finally:
            self.pages -= 1
            feed.readers -= 1
            if not feed.readers:
                self._feeds.pop(key, None)
                if feed.task is not None:
                    feed.task.cancel()

    def __len__(self) -> int:
        return len(self._feeds)


async def live(request: Request) -> Response:
    """Send a page's main part each time it changes. The query names the page: ``page=/agents?window=1h``."""
    app, wanted = request.app, request.query_params.get("page", "")
    scope = _scope_of(request, wanted) if is_inside(wanted) else None
    if scope is None:
        return refusal(HTTPStatus.NOT_FOUND, "This is no page that can be live.")
    if app.state.live.pages >= MAX_PAGES:
        headers = {"Retry-After": "60"}
        return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "Too many live pages are open.", headers)
    state, sessions, settings = request.state, app.state.sessions, app.state.settings
    session = state.session
    # A page with forms holds the CSRF token of one browser, so other browsers must not get this page. A page without
    # forms is the same for all browsers.
    key = (wanted, root_path(request), request.url.scheme, session if state.actions else "")

    def ended() -> bool:
        return settings.token is not None and bool(session) and not sessions.is_valid(session)

    closing = anyio.Event()
    return EventSourceResponse(
        app.state.live.events(key, lambda: rendered(scope), ended, closing),
        ping=_PING_S,
        send_timeout=_SEND_TIMEOUT_S,
        shutdown_event=closing,
        shutdown_grace_period=_CLOSE_S,
    )


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Run these coroutines until one of them ends, and then cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _scope_of(request: Request, wanted: str) -> Scope | None:
    """Return the scope of a request by the same client for the wanted page; None if there is no such page."""
    parts = urlsplit(wanted)
    scope: Scope = {
        **request.scope,
        "path": root_path(request) + unquote(parts.path),
        "raw_path": parts.path.encode(),
        "query_string": parts.query.encode(),
        "headers": [each for each in request.scope["headers"] if each[0] in (b"host", b"user-agent")],
        "state": {**request.scope["state"], "notice": "", "form": {}},
        "path_params": {},
    }
    scope.pop("endpoint", None)
    pages: list[BaseRoute] = request.app.state.pages
    return scope if any(page.matches(scope)[0] is Match.FULL for page in pages) else None


async def rendered(scope: Scope) -> str:
    """Run a request through the application, and return the main part of the resulting page."""
    chunks: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await scope["router"](dict(scope), receive, send)
    found = _MAIN.search(b"".join(chunks).decode())
    if found is None:
        raise ValueError(f"the page {scope['path']} has no <main>")
    return found[0]
