"""Turns views into pages, with the frame that all pages share. Also holds the pages for errors."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument
from agentperf_redis.views.timeline import DEFAULT_WINDOW, WINDOWS
from agentperf_redis.web.pages import text
from agentperf_redis.web.pages.asked import Asked, address, asked
from agentperf_redis.web.templating import path_for, templates

MENU: Final = (
    ("overview", "Overview"),
    ("agents", "Agents"),
    ("caches", "Caches"),
    ("pools", "Pools"),
    ("alerts", "Alerts"),
    ("memory", "Memory"),
)
"""Routes and titles of the pages in the menu."""
_RETRY_S: Final = 5
"""If the server is unreachable, a browser without JavaScript loads the page again after this many seconds."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page to show.

    Attributes:
        template: its template.
        title: its title.
        values: what the template shows.
        windowed: whether its numbers depend on the window.
        status: the status of the response.
        recent: whether the numbers were read a moment ago, so that they prove that the server can be reached.
        retry: seconds after which a browser without JavaScript loads the page again; None for never.
    """

    template: str
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    windowed: bool = True
    status: HTTPStatus = HTTPStatus.OK
    recent: bool = True
    retry: int | None = None


Handler = Callable[[Any, Asked], Awaitable[Page]]
"""Reads a page from ``request.app.state.views``."""


def page_route(path: str, name: str, handler: Handler, section: str | None = None) -> Route:
    """Return the route of a page.

    Args:
        path: its path.
        name: name of the route.
        handler: reads the page.
        section: name of the menu entry that is marked on the page; None for `name`.
    """

    async def endpoint(request: Request) -> Response:
        query = dict(request.query_params)
        try:
            found = await _read(request, handler, query)
        except InvalidArgument as error:
            about = {"error": error, "parameter": error.argument in query}
            found = Page("invalid.html", "Invalid address", about, windowed=False, status=HTTPStatus.BAD_REQUEST)
        except AgentPerfError as error:
            about = {"error": error}
            found = Page("error.html", "Error", about, windowed=False, status=HTTPStatus.INTERNAL_SERVER_ERROR)
        return _rendered(request, found, query, name, section or name)

    return Route(path, endpoint, name=name)


async def _read(request: Request, handler: Handler, query: Mapping[str, str]) -> Page:
    state = request.app.state
    try:
        found = await handler(state.views, asked(query))
    except BackendUnavailable as error:
        if getattr(state, "unreachable_since", None) is None:
            state.unreachable_since = time.time()
        about = {"error": error, "since": state.unreachable_since}
        return Page(
            "unreachable.html",
            "Server unreachable",
            about,
            windowed=False,
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            retry=_RETRY_S,
        )
    if found.recent:
        state.unreachable_since = None
    return found


def not_found(noun: str, name: str) -> Page:
    """Return the page about something that does not exist."""
    about = {"noun": noun, "name": name}
    return Page("missing.html", f"No such {noun}", about, windowed=False, status=HTTPStatus.NOT_FOUND)


def _rendered(request: Request, page: Page, query: Mapping[str, str], route: str, section: str) -> Response:
    here = path_for(request, route)
    window = query.get("window", DEFAULT_WINDOW)
    carried = {} if window == DEFAULT_WINDOW or page.template == "invalid.html" else {"window": window}
    backend = request.app.state.views.perf.backend

    inside = address(str(request.app.url_path_for(route)), query)

    def link(name: str, /, **parameters: object) -> str:
        return address(path_for(request, name), {**parameters, **carried})

    def same(**changes: object) -> str:
        return address(here, {**query, **changes})

    def kept(without: tuple[str, ...]) -> list[tuple[str, str]]:
        return [(name, value) for name, value in query.items() if name not in without]

    state = request.state
    context = {
        **page.values,
        "title": page.title,
        "route": route,
        "section": section,
        "menu": MENU,
        "windows": tuple(dict.fromkeys((*WINDOWS, window))) if page.windowed else (),
        "window": window,
        "href": link,
        "path": here,
        "here": same,
        "kept": kept,
        "back": inside,
        "live": address(path_for(request, "live"), {"page": inside}),
        "now": time.time(),
        "retry": page.retry,
        "namespace": backend.namespace,
        "address": backend.address.masked,
        "actions": getattr(state, "actions", False),
        "csrf": getattr(state, "csrf", ""),
        "can_log_out": bool(getattr(state, "session", "")) and request.app.state.settings.token is not None,
        "notice": getattr(state, "notice", ""),
    }
    return templates.TemplateResponse(request, page.template, context, status_code=page.status)


templates.env.globals.update(
    {
        name: getattr(text, name)
        for name in ("ago", "breakable", "clock", "cost", "duration", "moment", "number", "plural", "rate", "share")
    }
    | {name: getattr(text, name) for name in ("size", "times", "visible")}
)
templates.env.filters["visible"] = text.visible
templates.env.trim_blocks = templates.env.lstrip_blocks = True
