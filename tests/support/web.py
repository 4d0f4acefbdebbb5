"""Drives the web page without a network: requests of a browser, with its cookies, straight into the application."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

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

    @property
    def text(self) -> str:
        return self.body.decode()


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
        host: the name by which the browser calls it.
        cookies: by name.
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
        if dict(pairs).get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        return Reply(start["status"], dict(pairs), cookies, content)


async def _exchange(app: Any, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
    parts = urlsplit(path)
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": parts.path,
        "raw_path": quote(parts.path).encode(),
        "query_string": parts.query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items() if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8420),
        "state": {},
    }
    await app(scope, receive, send)
    for message in messages:
        yield message
