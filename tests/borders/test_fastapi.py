"""Requests of a FastAPI application count as executions, and leases are dependencies. See also test_starlette.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, Lease, LoadBalancer
from agentperf_redis.errors import InvalidArgument
from tests.support.web import Browser

pytest.importorskip("fastapi", reason="needs the extra fastapi")
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from agentperf_redis.integrations import fastapi as adapter
from agentperf_redis.integrations.fastapi import instrument, leased


def counts(perf: AgentPerf) -> dict[str, int]:
    assert perf.metrics.flush()
    return {name: found.task_count for name, found in perf.metrics.snapshots().items()}


def of(item: str) -> str:
    return item


async def chat(socket: WebSocket) -> None:
    await socket.accept()


def nested() -> tuple[FastAPI, APIRouter]:
    """Return two values: an application with nested routers and mounted applications, and its innermost router."""
    items, shop = APIRouter(prefix="/items"), APIRouter(prefix="/shop/{town}")
    items.add_api_route("/{item}", of, methods=["GET", "PUT"])
    items.add_api_websocket_route("/chat", chat)
    shop.include_router(items)
    app, inner = FastAPI(), FastAPI()
    app.add_api_route("/{item}/direct", of)
    app.include_router(shop, prefix="/v1")
    app.include_router(shop, prefix="/v2")
    inner.include_router(items)
    app.mount("/inner", inner)
    app.mount("/plain", Starlette(routes=[Route("/{x}", PlainTextResponse("x"))]))
    return app, items


def test_templates_include_the_prefixes_of_routers(perf: AgentPerf, runner: asyncio.Runner) -> None:
    app, _ = nested()
    instrument(app, perf)
    browser = Browser(runner, app)
    for path in (
        "/v1/shop/ulm/items/1",
        "/v1/shop/bonn/items/2",
        "/v2/shop/ulm/items/3",
        "/1/direct",
        "/inner/items/4",
    ):
        assert browser.get(path).status == 200
    assert browser.get("/plain/5").status == 200
    assert browser.send("PUT", "/v1/shop/ulm/items/6", {}).status == 200
    assert browser.send("DELETE", "/v1/shop/ulm/items/6", {}).status == 405
    assert browser.get("/docs").status == 200
    assert browser.get("/v3/7").status == 404
    assert counts(perf) == {
        "GET /v1/shop/{town}/items/{item}": 2,
        "GET /v2/shop/{town}/items/{item}": 1,
        "PUT /v1/shop/{town}/items/{item}": 1,
        "DELETE /v1/shop/{town}/items/{item}": 1,
        "GET /{item}/direct": 1,
        "GET /inner/items/{item}": 1,
        "GET /plain/{x}": 1,
        "GET /docs": 1,
        "unmatched": 1,
    }


def test_routes_that_are_added_later_are_found(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_LISTED_EVERY_S", 0.0)
    app, items = nested()
    instrument(app, perf)
    browser = Browser(runner, app)
    assert browser.get("/inner/items/1").status == 200
    app.add_api_route("/more/{item}", of)
    items.add_api_route("/{item}/late", of)
    assert browser.get("/more/1").status == 200
    if browser.get("/v1/shop/ulm/items/1/late").status == 200:  # FastAPI before 0.137 does not serve this route
        assert counts(perf)["GET /v1/shop/{town}/items/{item}/late"] == 1
    assert counts(perf)["GET /more/{item}"] == 1


def pool(perf: AgentPerf, capacity: int) -> LoadBalancer:
    lb = perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=capacity))
    return lb


def test_instance_is_not_to_blame_for_invalid_parameters(perf: AgentPerf, runner: asyncio.Runner) -> None:
    lb = pool(perf, 1)
    app = FastAPI()

    def twice(item: int, lease: Any = Depends(leased(lb, "coder"))) -> int:  # noqa: B008
        return 2 * item

    app.add_api_route("/items/{item}", twice)
    instrument(app, perf)
    browser = Browser(runner, app)
    assert browser.get("/items/1").status == 200
    assert browser.get("/items/x").status == 422
    (status,) = lb.status("coder")
    assert (status.instances[0].failed, status.instances[0].instance.current_load) == (0, 0)


def test_dependency_holds_a_lease_until_the_stream_was_sent(perf: AgentPerf, runner: asyncio.Runner) -> None:
    lb, loads = pool(perf, 9), []
    app = FastAPI()

    async def load() -> int:
        (status,) = await lb.aio.status("coder")
        return sum(each.instance.current_load for each in status.instances)

    async def body(lease: Lease) -> AsyncIterator[str]:
        loads.append(await load())
        yield lease.instance.id
        loads.append(await load())

    async def streams(lease: Annotated[Lease, Depends(leased(lb, "coder"))]) -> Any:
        return StreamingResponse(body(lease))

    def refuses(status: int, lease: Annotated[Lease, Depends(leased(lb, "coder"))]) -> None:
        raise HTTPException(status)

    # If the text of an annotation names a local variable, FastAPI cannot evaluate the annotation. So objects replace
    # the texts.
    streams.__annotations__["lease"] = refuses.__annotations__["lease"] = Annotated[Lease, Depends(leased(lb, "coder"))]
    app.add_api_route("/streams", streams)
    app.add_api_route("/refuses/{status}", refuses)
    instrument(app, perf)
    browser = Browser(runner, app)
    assert browser.get("/streams").text == "coder-1"
    for status in (404, 502):
        assert browser.get(f"/refuses/{status}").status == status
    loads.append(runner.run(load()))
    assert loads == [1, 1, 0]
    (found,) = lb.status("coder")
    assert (found.instances[0].served, found.instances[0].failed) == (1, 1), "404 is not the instance's fault"


def test_request_without_capacity_is_answered_with_retry_after(perf: AgentPerf, runner: asyncio.Runner) -> None:
    lb = pool(perf, 1)
    app, inner = FastAPI(), FastAPI()

    def ask(lease: Any = Depends(leased(lb, "coder"))) -> str:  # noqa: B008
        return str(lease.instance.id)

    app.add_api_route("/ask", ask)
    inner.add_api_route("/ask", ask)
    app.mount("/inner", inner)
    instrument(app, perf)
    browser = Browser(runner, app)
    assert browser.get("/ask").text == '"coder-1"'
    held = lb.acquire("coder")
    for path in ("/ask", "/inner/ask"):
        reply = browser.get(path)
        assert (reply.status, reply.text) == (503, '{"detail":"no capacity, try again later"}')
        assert int(reply.headers["retry-after"]) >= 1
    lb.release(held)
    assert perf.metrics.flush()
    assert perf.metrics.snapshots()["GET /ask"].error_types == {"NoCapacity": 1}


def test_invalid_arguments_are_named(perf: AgentPerf) -> None:
    nothing: Any = None
    with pytest.raises(InvalidArgument, match=r"^app is"):
        instrument(nothing, perf)
    with pytest.raises(InvalidArgument, match=r"^wait is"):
        leased(perf.balancer(), "coder", wait=-1)
