"""The web page works inside another application, under any path."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urljoin

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.web import app
from tests.support.markup import parsed
from tests.support.web import TOKEN, Browser, OpenPage

ROOT = "/ops/agentperf"


async def agents(_: Request) -> Response:
    """A page of the outer application. A page of this library's application has the same name."""
    return PlainTextResponse("the outer one")


def mounted(inner: Any, framework: str) -> Any:
    if framework == "fastapi":
        fastapi = pytest.importorskip("fastapi")
        outer = fastapi.FastAPI()
        outer.add_api_route("/agents", lambda: "the outer one", name="agents")
        outer.mount(ROOT, inner)
        return outer
    return Starlette(routes=[Route("/agents", agents, name="agents"), Mount(ROOT, inner)])


@pytest.mark.parametrize("framework", ["starlette", pytest.param("fastapi", marks=pytest.mark.thorough)])
def test_all_links_lead_into_the_mounted_application(perf: AgentPerf, runner: asyncio.Runner, framework: str) -> None:
    perf.metrics.record_execution("a/b c", 0.1, success=True)
    assert perf.metrics.flush()
    browser = Browser(runner, mounted(app(perf, refresh=0.1), framework))
    page = browser.get(f"{ROOT}/agents")
    assert (page.status, "a/b c" in parsed(page.text).text.replace("\u200b", "")) == (200, True)
    links = {urljoin(f"{ROOT}/agents", link) for link in parsed(page.text).links if not link.startswith("#")}
    links |= set(page.resources())
    assert len(links) > 10
    for link in links:
        assert link.startswith(f"{ROOT}/"), link
        assert browser.get(link).status == 200, link
    assert "the outer one" in browser.get("/agents").text
    assert browser.get(f"{ROOT}/nowhere").status == 404

    async def live() -> None:
        async with OpenPage(browser, "/agents", root=ROOT) as opened:
            await opened.wait()
            assert f'href="{ROOT}/agent?name=' in opened.last

    runner.run(live())


def test_login_returns_to_the_mounted_page(perf: AgentPerf, runner: asyncio.Runner) -> None:
    browser = Browser(runner, mounted(app(perf, token=TOKEN, allow_actions=True), "starlette"))
    asked = browser.get(f"{ROOT}/agents?window=1h")
    assert asked.headers["location"] == f"{ROOT}/login?next=%2Fagents%3Fwindow%3D1h"
    form = {"token": TOKEN, "next": "/agents?window=1h"}
    reply = browser.post(f"{ROOT}/login", form)
    assert (reply.status, reply.headers["location"]) == (303, f"{ROOT}/agents?window=1h")
    assert f"; Path={ROOT}; HttpOnly; SameSite=Lax" in reply.cookies[0]
    assert browser.get(f"{ROOT}/agents").status == 200
    assert browser.post(f"{ROOT}/logout").headers["location"] == f"{ROOT}/login"


def test_application_checks_its_arguments(perf: AgentPerf) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"perf": perf.backend}, "perf"),
        ({"perf": perf, "token": "short"}, "token"),
        ({"perf": perf, "hosts": "x"}, "hosts"),
        ({"perf": perf, "allow_actions": 1}, "allow_actions"),
        ({"perf": perf, "refresh": -1}, "refresh"),
    ]
    for arguments, named in cases:
        with pytest.raises(InvalidArgument, match=named):
            app(**arguments)
