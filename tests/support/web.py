"""Drives the web page without a network: requests of a browser, with its cookies, straight into the application."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from agentperf_redis import AgentPerf
from agentperf_redis.web.application import build
from agentperf_redis.web.settings import checked

TOKEN = "correct-horse-battery"
ACCEPTS_HTML = "text/html,*/*"


@dataclass(frozen=True)
class Reply:
    """The answer to a request. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    cookies: list[str]
    body: bytes
    sent: int
    """Bytes of headers and body on the wire."""

    @property
    def text(self) -> str:
        return self.body.decode()

    def resources(self) -> list[str]:
        """Return the addresses of the files that a browser loads with this page."""
        return re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', self.text)


async def home(request: Request) -> Response:
    """Answer with what a page finds in its request."""
    found = {name: getattr(request.state, name) for name in ("csrf", "actions", "notice")}
    return HTMLResponse(f"<title>home</title><main>{json.dumps(found)}</main>")


PAGES: list[BaseRoute] = [Route("/", home, name="home")]


def small_site(perf: AgentPerf, *, pages: list[BaseRoute] | None = None, **options: Any) -> Any:
    """Make an application that has the page `home` only."""
    token, refresh = options.pop("token", None), options.pop("refresh", 0.05)
    settings = checked(
        token,
        allow_actions=options.pop("allow_actions", False),
        hosts=options.pop("hosts", None),
        refresh=refresh,
    )
    assert not options
    return build(perf, settings, PAGES if pages is None else pages)


@dataclass
class Browser:
    """A browser that keeps cookies.

    Attributes:
        runner: the event loop of the test.
        app: the application.
        host: the host name in the addresses that the browser uses.
        cookies: the values of the cookies, by name.
    """

    runner: asyncio.Runner
    app: Any
    host: str = "localhost:8420"
    cookies: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, {"accept": ACCEPTS_HTML, **headers})

    def post(self, path: str, form: dict[str, str] | None = None, **headers: str) -> Reply:
        """Send a form as this site's own page does."""
        usual = {"origin": f"http://{self.host}", "content-type": "application/x-www-form-urlencoded"}
        return self.send("POST", path, {"accept": ACCEPTS_HTML, **usual, **headers}, urlencode(form or {}).encode())

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Reply:
        """Send a request. In names of headers, "_" stands for "-". An empty value leaves the header out."""
        return self.runner.run(self.sending(method, path, headers, body))

    async def sending(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Reply:
        sent = {"host": self.host} | {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            sent.setdefault("cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items()))
        messages = [message async for message in _exchange(self.app, method, path, sent, body)]
        start, chunks = messages[0], [message.get("body", b"") for message in messages[1:]]
        pairs = [(name.decode().lower(), value.decode("latin-1")) for name, value in start["headers"]]
        cookies = [value for name, value in pairs if name == "set-cookie"]
        for each in cookies:
            name, _, value = each.partition(";")[0].partition("=")
            if "Max-Age=0" in each:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
        content = b"".join(chunks)
        sent_bytes = len(content) + sum(len(name) + len(value) + 4 for name, value in pairs)
        if dict(pairs).get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        return Reply(start["status"], dict(pairs), cookies, content, sent_bytes)


async def _exchange(app: Any, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
    messages: list[Any] = []
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # the browser stays connected
        return None

    async def send(message: Any) -> None:
        messages.append(message)

    await app(scope_of(method, path, headers), receive, send)
    for message in messages:
        yield message


def scope_of(method: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    parts = urlsplit(path)
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(parts.path),
        "raw_path": quote(parts.path, safe="/%").encode(),
        "query_string": parts.query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items() if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8420),
        "state": {},
    }


class OpenPage:
    """A live page that a browser has open: ``async with OpenPage(browser, "/agents") as page``.

    Attributes:
        events: number of events so far.
        last: data of the last event.
        status: status of the response; 0 before the response.
    """

    def __init__(self, browser: Browser, page: str = "/", *, root: str = "") -> None:
        self._browser = browser
        self._query = urlencode({"page": page})
        self._root = root
        self._closed = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.events = 0
        self.last = ""
        self.status = 0

    async def __aenter__(self) -> Self:
        cookie = "; ".join(f"{name}={value}" for name, value in self._browser.cookies.items())
        headers = {"host": self._browser.host, "accept": "text/event-stream", "cookie": cookie}
        scope = {
            **scope_of("GET", f"{self._root}/live?{self._query}", headers),
            "query_string": self._query.encode(),
        }
        self._task = asyncio.create_task(self._browser.app(scope, self._receive, self._send))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed.set()
        assert self._task is not None
        async with asyncio.timeout(30):
            await self._task

    async def wait(self, events: int = 1) -> None:
        """Wait until this many events have arrived."""
        async with asyncio.timeout(60), self._arrived:
            await self._arrived.wait_for(lambda: self.events >= events)

    async def _receive(self) -> Any:
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        text = message.get("body", b"").decode()
        if not text.startswith("event: main"):
            return
        lines = text.splitlines()
        async with self._arrived:
            self.last = "\n".join(line.removeprefix("data: ") for line in lines if line.startswith("data: "))
            self.events += 1
            self._arrived.notify_all()
