"""Tests of the checks that each request passes. They need no server: no checked request reads anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from agentperf_redis import AgentPerf
from agentperf_redis.web import security
from agentperf_redis.web.sessions import SESSION_S, Sessions
from tests.support.web import ACCEPTS_HTML, TOKEN, Browser, small_site

Make = Callable[..., Browser]


@pytest.fixture
def make(runner: asyncio.Runner) -> Iterator[Make]:
    """Make a browser and a site: `make(token=TOKEN)`."""
    perf = AgentPerf("redis://127.0.0.1:1/0", namespace="web")

    def opened(**options: Any) -> Browser:
        return Browser(runner, small_site(perf, **options))

    yield opened
    perf.close()


def seen(browser: Browser) -> dict[str, object]:
    """Return what the page finds in its request."""
    reply = browser.get("/")
    assert reply.status == 200, reply.text
    found: dict[str, object] = json.loads(reply.text.partition("<main>")[2].partition("</main>")[0])
    return found


def test_page_has_strict_headers(make: Make) -> None:
    for path in ("/", "/nowhere", "/static/../settings.py", "/metrics?x=1"):
        headers = make(hosts=["elsewhere.example"], token=TOKEN).get(path).headers
        assert headers["content-security-policy"] == security.POLICY
        assert "unsafe" not in security.POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"


def test_browsers_keep_files_but_no_pages(make: Make) -> None:
    browser = make()
    assert browser.get("/").headers["cache-control"] == "no-store"
    file = browser.get("/static/style.css")
    assert file.headers["cache-control"] == "no-cache"
    assert browser.get("/static/style.css", if_none_match=file.headers["etag"]).status == 304


def test_rebinding_name_is_refused(make: Make) -> None:
    browser = make()
    for host in ("evil.example", "evil.example:8420", "127.0.0.1.nip.io", "localhost@evil.example", "\xe9vil"):
        browser.host = host
        reply = browser.get("/")
        assert (reply.status, "home" in reply.text) == (400, False)
        assert reply.headers["content-type"].startswith("text/plain")
    browser.host = ""
    assert browser.get("/").status == 400
    browser.host = "[::1]:8420"
    assert browser.get("/").status == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://localhost",
        "http://localhost:84200",
        "https://localhost:8420/x",
        "localhost:8420",
        "http://[",
        "file://localhost:8420",
        "http://localhost:8420.evil.example",
    ],
)
def test_form_of_another_origin_is_refused(make: Make, origin: str) -> None:
    browser = make(allow_actions=True)
    csrf = str(seen(browser)["csrf"])
    form = {"csrf": csrf, "back": "/"}
    assert browser.post("/actions/none", form).status == 404, "the same form of this origin passes the checks"
    reply = browser.post("/actions/none", form, origin=origin)
    assert (reply.status, "This request comes from another site." in reply.text) == (403, True)


def test_foreign_page_cannot_embed_or_fetch(make: Make) -> None:
    browser = make()
    assert browser.get("/", origin="http://evil.example").status == 403
    assert browser.get("/live?page=/", sec_fetch_site="cross-site", sec_fetch_mode="cors").status == 403
    assert browser.get("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200, "a link"
    assert browser.get("/", sec_fetch_site="same-origin", sec_fetch_mode="cors").status == 200


def test_default_port_may_be_left_out_of_origin(make: Make) -> None:
    browser = make(token=TOKEN)
    for host, origin in (
        ("ops.example.com", "https://ops.example.com"),
        ("ops.example.com:443", "https://OPS.example.com"),
    ):
        browser.host = host
        assert browser.post("/login", {"token": "wrong"}, origin=origin).status == 401


@pytest.mark.parametrize(
    "path",
    ["/", "/live?page=/", "/metrics", "/actions/drain", "/nowhere", "//", "/login/", "/static", "/x/../static/a"],
)
def test_everything_needs_the_token(make: Make, path: str) -> None:
    browser = make(token=TOKEN, allow_actions=True)
    for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer "}, {"authorization": TOKEN}):
        reply = browser.get(path, **headers)
        assert (reply.status, reply.headers["location"].partition("?")[0]) == (303, "/login")
        reply = browser.get(path, **{**headers, "accept": "*/*"})
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert browser.post(path, {"csrf": "0" * 128}).status == 401
    old = Sessions("another-token-than-that").new()
    ended = Sessions(TOKEN, clock=lambda: 1e9).new()
    for cookie in ("", "x", TOKEN, old, ended):
        browser.cookies = {browser.app.state.sessions.cookie_name: cookie}
        assert browser.get(path).status == 303, cookie


def test_address_of_the_events_tells_whether_the_login_has_ended(make: Make) -> None:
    """The script of a live page requests this address when the connection of the page is refused."""
    browser = make(token=TOKEN)
    assert browser.get("/live", accept="*/*").status == 401
    browser.post("/login", {"token": TOKEN})
    assert browser.get("/live", accept="*/*").status == 404


def test_login_sets_a_cookie_that_no_script_gets(make: Make) -> None:
    browser = make(token=TOKEN)
    asked = browser.get("/?window=1h&match=a%20b")
    assert asked.headers["location"] == "/login?next=%2F%3Fwindow%3D1h%26match%3Da%2520b"
    assert browser.get(asked.headers["location"]).status == 200
    refused = browser.post("/login", {"token": "wrong", "next": "/?window=1h"})
    assert (refused.status, refused.cookies) == (401, [])
    assert TOKEN not in refused.text
    reply = browser.post("/login", {"token": f" {TOKEN}\n", "next": "/?window=1h"})
    assert (reply.status, reply.headers["location"]) == (303, "/?window=1h")
    (cookie,) = reply.cookies
    assert cookie.endswith(f"; Max-Age={SESSION_S}; Path=/; HttpOnly; SameSite=Lax")
    assert TOKEN not in cookie
    assert browser.get("/").status == 200
    assert browser.post("/logout").headers["location"] == "/login"
    assert browser.get("/").status == 303


def test_bearer_token_opens_pages_but_no_actions(make: Make) -> None:
    browser = make(token=TOKEN, allow_actions=True)
    assert browser.get("/", authorization=f"bearer {TOKEN}").status == 200
    reply = browser.post("/actions/none", {"csrf": ""}, authorization=f"Bearer {TOKEN}")
    assert (reply.status, reply.text[:18]) == (403, "This form is too o")


@pytest.mark.parametrize(
    "there",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\/evil.example",
        "",
        "/\n/x",
        "javascript:alert(1)",
        "/\x00",
    ],
)
def test_login_leads_to_no_other_site(make: Make, there: str) -> None:
    reply = make(token=TOKEN).post("/login", {"token": TOKEN, "next": there})
    assert (reply.status, reply.headers["location"]) == (303, "/")


def test_next_page_is_escaped(make: Make) -> None:
    reply = make(token=TOKEN).get('/login?next=/"><script>alert(1)</script>')
    assert reply.status == 200
    assert "<script" not in reply.text


def test_page_without_actions_takes_no_form(make: Make) -> None:
    browser = make()
    assert seen(browser) == {"csrf": "", "actions": False, "notice": ""}
    assert browser.cookies == {}, "a page that only reads needs no cookie"
    reply = browser.post("/actions/drain", {"pool": "a", "instance": "b"})
    assert (reply.status, reply.text) == (
        403,
        "This page is read-only. `agentperf serve --allow-actions` allows actions.\n",
    )


def test_form_needs_the_csrf_token_of_its_browser(make: Make) -> None:
    browser = make(allow_actions=True)
    mine = str(seen(browser)["csrf"])
    other = Browser(browser.runner, browser.app)
    theirs = str(seen(other)["csrf"])
    for csrf in (None, "", "0" * 128, theirs, mine[:-1]):
        reply = browser.post("/actions/none", {} if csrf is None else {"csrf": csrf})
        assert (reply.status, "Load the page again" in reply.text) == (403, True)
    assert browser.post("/actions/none", {"csrf": mine}).status == 404
    browser.cookies.clear()
    assert browser.post("/actions/none", {"csrf": mine}).status == 403


def test_csrf_token_is_not_repeated(make: Make) -> None:
    browser = make(allow_actions=True)
    assert seen(browser)["csrf"] != seen(browser)["csrf"]


def test_large_requests_are_refused(make: Make) -> None:
    browser, huge = make(allow_actions=True), "x" * 10_000_000
    assert browser.get("/", x_large=huge).status == 431
    assert browser.get(f"/?a={huge}").status == 431
    csrf = str(seen(browser)["csrf"])
    assert browser.post("/actions/none", {"csrf": csrf, "key": huge}).status == 413
    assert browser.post("/actions/none", {"csrf": csrf, **{f"f{n}": "" for n in range(100)}}).status == 413


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"])
def test_other_methods_are_refused(make: Make, method: str) -> None:
    browser = make(allow_actions=True)
    assert browser.send(method, "/", {"origin": "http://localhost:8420"}).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/../settings.py",
        "/static/..%2fsettings.py",
        "/static/%2e%2e/settings.py",
        "/static//etc/passwd",
        "/static/....//settings.py",
        "/static/\x00",
        "/static/..\\settings.py",
        "/static/",
        "/../settings.py",
    ],
)
def test_path_outside_is_not_found(make: Make, path: str) -> None:
    reply = make().get(path)
    assert (reply.status, "Settings" in reply.text) == (404, False)


def test_no_page_may_be_live_but_those_of_the_site(make: Make) -> None:
    browser = make()
    for page in (
        "",
        "/live?page=/",
        "/metrics",
        "/static/a",
        "/login",
        "http://evil.example/",
        "//evil.example",
        "/nowhere",
    ):
        assert browser.get(f"/live?page={page}").status == 404, page


def test_notice_is_shown_once(make: Make) -> None:
    browser = make()
    browser.cookies[security.NOTICE_COOKIE] = "a%20%3Cscript%3E"
    assert browser.get("/static/x", accept="*/*").cookies == []
    assert seen(browser)["notice"] == "a <script>"
    assert seen(browser)["notice"] == ""


def test_websocket_is_closed(make: Make) -> None:
    browser, sent = make(), []

    async def connect() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await browser.app({"type": "websocket", "path": "/", "headers": []}, receive, send)

    browser.runner.run(connect())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_head_has_no_body(make: Make) -> None:
    reply = make().send("HEAD", "/", {"accept": ACCEPTS_HTML})
    assert reply.status == 200


def test_form_that_breaks_off_is_no_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise anyone could fill the log with tracebacks."""

    async def broken(request: Request) -> dict[str, str]:
        del request
        raise ClientDisconnect

    monkeypatch.setattr(security, "_form", broken)
    assert make(token=TOKEN).post("/login", {"token": TOKEN}).status == 400


def test_login_to_one_namespace_keeps_that_to_another(runner: asyncio.Runner) -> None:
    """A browser sends a cookie to every port of its host, so each of the two pages gets the cookies of both."""
    tokens = {"a": TOKEN, "b": f"{TOKEN}-2"}
    perfs = {name: AgentPerf("redis://127.0.0.1:1/0", namespace=name) for name in tokens}
    browsers = {name: Browser(runner, small_site(perfs[name], token=token)) for name, token in tokens.items()}
    browsers["b"].cookies = browsers["a"].cookies
    for name, token in tokens.items():
        assert browsers[name].post("/login", {"token": token}).status == 303
    assert [browser.get("/").status for browser in browsers.values()] == [200, 200]
    for perf in perfs.values():
        perf.close()


def test_cookie_says_nothing_about_the_password_of_the_server() -> None:
    """Each visitor gets a cookie. If its code depended on the password, visitors could test guesses of the password."""

    def sessions(password: str) -> Sessions:
        perf = AgentPerf(f"redis://:{password}@127.0.0.1:1/0", namespace="web")
        made: Sessions = small_site(perf, allow_actions=True).state.sessions
        perf.close()
        return made

    assert sessions("two").is_valid(sessions("one").new())
