"""The checks that each request passes, and the headers that each response gets.

A request is refused before a page sees it if its headers are too large, if its Host header is not allowed, if it comes
from another origin, or if it carries no proof of the token (where there is one). A request that may change something
must be a POST of a form of this application: it needs an Origin header and the CSRF token of this browser, and actions
must be allowed.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentperf_redis.web.sessions import SESSION_S, Sessions
from agentperf_redis.web.settings import Settings
from agentperf_redis.web.templating import path_for, root_path

NOTICE_COOKIE: Final = "agentperf_notice"
MAX_HEADER_BYTES: Final = 32 * 1024
"""Maximum size of the path, the query and all headers. A browser sends about 1 kB."""
MAX_FORM_BYTES: Final = 64 * 1024
"""Maximum size of a form. The key of a cache entry is the largest field."""
MAX_FIELDS: Final = 20
FORMS_OF_LOGIN: Final = ("/login", "/logout")
"""Paths of the forms that change only the browser's cookie. Their origin is checked, like the origin of all forms."""
MAX_NOTICE: Final = 300
"""Maximum length of a notice, in characters. It is small, because a cookie holds the notice."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy: nothing inline, nothing from elsewhere. A page that needs more sets its own."""
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer, browsers would send "Origin: null" with forms, so every form would be refused.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}


class Guard:
    """ASGI middleware: the checks and the headers.

    Args:
        app: the application behind it.
        settings: the settings.
        sessions: the logins.
    """

    def __init__(self, app: ASGIApp, settings: Settings, sessions: Sessions) -> None:
        self._app = app
        self._settings = settings
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            # If this application is mounted on another one, Starlette looks up route names in the outer application.
            # The next two lines prevent this lookup.
            scope["router"] = scope["app"].router
            scope["app_root_path"] = scope.get("root_path", "")
            request, cookies = Request(scope, receive), list[str]()
            headers = _HEADERS | ({"Cache-Control": "no-cache"} if _is_file(route_path(request)) else {})
            answer = self._refused(request) or await self._refused_form(request)
            if answer is None:
                self._describe(request, cookies)
            await (answer or self._app)(scope, receive, _with_headers(send, headers, cookies))

    def _refused(self, request: Request) -> Response | None:
        scope = request.scope
        size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers of this request are too large.")
        host = request.headers.get("host", "")
        if not self._settings.allows_host(host):
            advice = "Allow it with `agentperf serve --allow-host NAME` or `app(perf, hosts=[NAME])`."
            return refusal(HTTPStatus.BAD_REQUEST, f"This page may not be called by the name {host[:100]!r}. {advice}")
        if request.method not in ("GET", "HEAD", "POST"):
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Use GET.", {"Allow": "GET, HEAD, POST"})
        if not _is_same_origin(request, host):
            advice = "If there is a proxy in between, it must pass the Host header on."
            return refusal(HTTPStatus.FORBIDDEN, f"This request comes from another site. {advice}")
        if self._settings.token is None or is_public(request) or self._proves_token(request):
            return None
        return _login_needed(request)

    async def _refused_form(self, request: Request) -> Response | None:
        """Read the form of a POST into ``request.state.form``, and check that it may be used."""
        request.scope["state"] = {**request.scope.get("state", {}), "form": {}}
        if request.method != "POST":
            return None
        try:
            request.state.form = form = await _form(request)
        except ValueError:
            return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "This form is too large.")
        except ClientDisconnect:  # the client is gone and gets no answer; an error would only fill the log
            return refusal(HTTPStatus.BAD_REQUEST, "This form is incomplete.")
        if route_path(request) in FORMS_OF_LOGIN:
            return None
        if not self._settings.allow_actions:
            advice = "`agentperf serve --allow-actions` allows actions."
            return refusal(HTTPStatus.FORBIDDEN, f"This page is read-only. {advice}")
        if not self._sessions.is_csrf(form.get("csrf", ""), self._session(request)):
            return refusal(HTTPStatus.FORBIDDEN, "This form is too old, or from another page. Load the page again.")
        return None

    def _proves_token(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return bool(self._session(request)) or (scheme.lower() == "bearer" and self._sessions.is_token(given.strip()))

    def _session(self, request: Request) -> str:
        """Return the valid cookie of a request, or ""."""
        cookie = request.cookies.get(self._sessions.cookie_name, "")
        return cookie if cookie and self._sessions.is_valid(cookie) else ""

    def _describe(self, request: Request, cookies: list[str]) -> None:
        """Set the values in ``request.state`` that pages use, and append new cookies to `cookies`."""
        session = self._session(request)
        if not session and self._settings.allow_actions and self._settings.token is None:
            session = self._sessions.new()
            cookies.append(cookie(request, self._sessions.cookie_name, session, SESSION_S))
        state = request.state
        state.session = session
        state.actions = self._settings.allow_actions and bool(session)
        state.csrf = self._sessions.csrf(session) if state.actions else ""
        state.notice = ""
        if NOTICE_COOKIE in request.cookies and "text/html" in request.headers.get("accept", ""):
            state.notice = unquote(request.cookies[NOTICE_COOKIE])[:MAX_NOTICE]
            cookies.append(cookie(request, NOTICE_COOKIE, "", 0))


def refusal(status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> Response:
    """Return a refusal in plain text, which no browser takes for a page."""
    return PlainTextResponse(f"{text}\n", status, headers)


def route_path(request: Request) -> str:
    """Return the path without the path under which the application is mounted."""
    path: str = request.scope["path"]
    root = root_path(request)
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_public(request: Request) -> bool:
    """Whether a request needs no login: the form of the login, and the files of the package."""
    path = route_path(request)
    return path in FORMS_OF_LOGIN or _is_file(path)


def _is_file(path: str) -> bool:
    return path.startswith("/static/")


def is_inside(path: str) -> bool:
    """Whether a text is a path of this application with an optional query, not the address of another site."""
    return path.startswith("/") and path[1:2] not in ("/", "\\") and path.isascii() and path.isprintable()


def _is_same_origin(request: Request, host: str) -> bool:
    """Whether a request comes from a page of this address, or from the address bar or a link.

    Browsers send Origin with each POST, and Sec-Fetch-Site with each request.
    """
    origin = request.headers.get("origin")
    if origin is not None:
        return _is_origin_of(origin, host)
    if request.method == "POST":
        return False
    embedded = request.headers.get("sec-fetch-mode", "navigate") != "navigate"
    return not embedded or request.headers.get("sec-fetch-site") not in ("cross-site", "same-site")


def _is_origin_of(origin: str, host: str) -> bool:
    try:
        scheme, netloc, *rest = urlsplit(origin.lower())
    except ValueError:
        return False
    port = _DEFAULT_PORTS.get(scheme)
    if port is None or any(rest):
        return False
    return netloc.removesuffix(f":{port}") == host.lower().removesuffix(f":{port}")


def _login_needed(request: Request) -> Response:
    wants_page = "text/html" in request.headers.get("accept", "") and request.method == "GET"
    if not wants_page:
        text = "Log in, or send the header `Authorization: Bearer TOKEN`."
        return refusal(HTTPStatus.UNAUTHORIZED, text, {"WWW-Authenticate": "Bearer"})
    query = request.scope["query_string"].decode("latin-1")
    here = quote(route_path(request), safe="/~") + (f"?{query}" if query else "")
    return RedirectResponse(f"{path_for(request, 'login')}?{urlencode({'next': here})}", HTTPStatus.SEE_OTHER)


async def _form(request: Request) -> dict[str, str]:
    """Read a form.

    Raises:
        ValueError: it is larger than `MAX_FORM_BYTES`, or has more fields than any form here.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise ValueError("too large")
    return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS))


def cookie(request: Request, name: str, value: str, max_age: int) -> str:
    """Return the text of a Set-Cookie header. Only this application, and no script, gets the cookie back.

    With SameSite=Strict, a browser that follows a link from a chat or a mail would not send the cookie: the user
    would have to log in again. Without a token, the browser would get a new session, and the forms in its other tabs
    would become invalid. With Lax, forms of other sites do not carry the cookie either. The Origin and the CSRF token
    of each form are checked in any case.
    """
    secure = "; Secure" if request.url.scheme == "https" else ""
    path = quote(root_path(request), safe="/~") or "/"
    return f"{name}={value}; Max-Age={max_age}; Path={path}; HttpOnly; SameSite=Lax{secure}"


def _with_headers(send: Send, headers: dict[str, str], cookies: list[str]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            found = MutableHeaders(scope=message)
            for name, value in headers.items():
                found.setdefault(name, value)
            for each in cookies:
                found.append("Set-Cookie", each)
        await send(message)

    return sending
