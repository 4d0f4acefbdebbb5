"""Requests of a Starlette application count as executions, and endpoints hold leases. See also test_web_servers.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, NoCapacity
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.spans import current_span
from tests.support.web import Browser, scope_of

pytest.importorskip("starlette", reason="needs the extra starlette")
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from agentperf_redis.integrations.starlette import instrument, leased


async def ok(request: Request) -> Response:
    return PlainTextResponse("ok")


def blocking(request: Request) -> Response:
    span = current_span()
    assert span is not None, "threads of blocking endpoints see the execution"
    return PlainTextResponse(span.agent_name)


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """An application that uses no framework."""
    await PlainTextResponse("plain")(scope, receive, send)


class OtherFramework:
    """An application of another framework, such as Litestar, whose routes are not Starlette's."""

    routes = (object(),)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await plain(scope, receive, send)


Site = Callable[..., Browser]


@pytest.fixture
def site(perf: AgentPerf, runner: asyncio.Runner) -> Site:
    """Return a function that makes an instrumented application with the given routes, and returns a browser for it."""

    def make(*routes: BaseRoute, middleware: Any = None, **options: Any) -> Browser:
        app = Starlette(routes=routes, middleware=middleware)
        instrument(app, perf, **options)
        return Browser(runner, app)

    return make


def counts(perf: AgentPerf) -> dict[str, int]:
    assert perf.metrics.flush()
    return {name: found.task_count for name, found in perf.metrics.snapshots().items()}


def test_requests_count_by_the_template_of_their_route(site: Site, perf: AgentPerf) -> None:
    inner = Starlette(routes=[Route("/{order:int}/lines", ok), Mount("/deep", routes=[Route("/{name}", blocking)])])
    browser = site(
        Route("/", ok),
        Route("/items/{item}", ok, methods=["GET", "POST"]),
        Mount("/orders/{year:int}", inner),
        Mount("/files", plain),
        Mount("/other", OtherFramework()),
        Host("{tenant}.example.org", Starlette(routes=[Route("/of/{it}", ok)])),
        Route("/anything", ok, methods=["GET", "BREW"]),
    )
    for path in (
        "/",
        "/items/1",
        "/items/2",
        "/orders/2026/7/lines",
        "/orders/2027/8/lines",
        "/files/a/b.css",
        "/other/1",
    ):
        assert browser.get(path).status == 200
    assert browser.get("/orders/2026/deep/x").text == "GET /orders/{year}/deep/{name}"
    assert browser.post("/items/3").status == 200
    assert browser.send("DELETE", "/items/3", {}).status == 405
    assert browser.send("BREW", "/anything", {}).status == 200
    assert browser.get("/of/3", host="a.example.org").status == 200
    for path in ("/no/1", "/no/2", "/orders/2026/no"):
        assert browser.get(path).status == 404
    assert counts(perf) == {
        "GET /": 1,
        "GET /items/{item}": 2,
        "POST /items/{item}": 1,
        "DELETE /items/{item}": 1,
        "GET /orders/{year}/{order}/lines": 2,
        "GET /orders/{year}/deep/{name}": 1,
        "GET /orders/{year}/{path}": 1,
        "GET /files/{path}": 1,
        "GET /other/{path}": 1,
        "GET /of/{it}": 1,
        "OTHER /anything": 1,
        "unmatched": 2,
    }


def test_prefix_and_skipped_routes(site: Site, perf: AgentPerf) -> None:
    browser = site(Route("/health", ok), Route("/" + "x" * 300, ok), prefix="shop ", skip=["/health"])
    assert browser.get("/health").status == 200
    assert browser.get("/" + "x" * 300).status == 200
    assert browser.get("/no").status == 404
    assert counts(perf) == {"shop GET /" + "x" * 190: 1, "shop unmatched": 1}


async def fails(request: Request) -> Response:
    raise KeyError(request.path_params.get("name"))


async def refuses(request: Request) -> Response:
    raise HTTPException(int(request.path_params["status"]))


def in_parts(*parts: str | Exception) -> Callable[[Request], Any]:
    async def body() -> AsyncIterator[str]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(body())

    return endpoint


async def stops_early(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_errors_and_statuses_decide_the_outcome(site: Site, perf: AgentPerf) -> None:
    browser = site(
        Route("/fails", fails),
        Route("/refuses/{status}", refuses),
        Route("/streams", in_parts("a", "b")),
        Route("/breaks", in_parts("a", ConnectionError("as the test wants"))),
        Mount("/early", stops_early),
    )
    with pytest.raises(KeyError):
        browser.get("/fails")
    with pytest.raises(ConnectionError):
        browser.get("/breaks")
    for status in (404, 429, 502, 502):
        assert browser.get(f"/refuses/{status}").status == status
    assert browser.get("/streams").text == "ab"
    browser.get("/early/x")
    assert perf.metrics.flush()
    found = {name: (each.success_count, dict(each.error_types)) for name, each in perf.metrics.snapshots().items()}
    assert found == {
        "GET /fails": (0, {"KeyError": 1}),
        "GET /breaks": (0, {"ConnectionError": 1}),
        "GET /refuses/{status}": (2, {"HTTP 502": 2}),
        "GET /streams": (1, {}),
        "GET /early/{path}": (0, {"incomplete response": 1}),
    }


def test_stream_is_measured_to_its_end_and_background_work_is_not(
    site: Site, perf: AgentPerf, runner: asyncio.Runner
) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(sum(counts(perf).values()))

    async def slowly() -> AsyncIterator[str]:
        await asyncio.to_thread(look)
        yield "a"
        await asyncio.to_thread(look)

    def afterwards() -> None:
        look()
        raise ValueError("as the test wants")

    async def streams(request: Request) -> Response:
        return StreamingResponse(slowly(), background=BackgroundTask(afterwards))

    with pytest.raises(ValueError, match="as the test wants"):
        site(Route("/", streams)).get("/")
    assert seen == [0, 0, 1]
    (found,) = perf.metrics.snapshots().values()
    assert found.failure_count == 0


async def exchange(app: Any, path: str, received: list[Any], *, kind: str = "http", fail_after: int = 99) -> list[Any]:
    """Run one request, with `received` as the client's messages. After `fail_after` messages, each `send` fails."""
    sent: list[Any] = []

    async def receive() -> Any:
        if received:
            return received.pop(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if len(sent) >= fail_after:
            raise OSError("the client has left")
        sent.append(message)

    await app(scope_of("GET", path, {}) | {"type": kind}, receive, send)
    return sent


async def watches(request: Request) -> Response:
    assert await request.is_disconnected()
    return PlainTextResponse("for nobody")


async def reads(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def endless(request: Request) -> Response:
    async def body() -> AsyncIterator[str]:
        while True:
            yield "x"
            await asyncio.sleep(0.001)

    return StreamingResponse(body())


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "BaseHTTPMiddleware"])
def test_departure_of_the_client_is_a_cancellation(
    site: Site, perf: AgentPerf, runner: asyncio.Runner, wrapped: bool
) -> None:
    class Wrapped(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            response: Response = await call_next(request)
            return response

    middleware = [Middleware(Wrapped)] if wrapped else []
    app = site(
        Route("/watches", watches), Route("/reads", reads), Route("/endless", endless), middleware=middleware
    ).app
    begun = {"type": "http.request", "body": b"", "more_body": True}
    whole = {"type": "http.request", "body": b"", "more_body": False}

    async def main() -> None:
        with pytest.raises(Exception):  # noqa: B017  ClientDisconnect, or an error that it causes in the middleware
            await exchange(app, "/reads", [begun])
        if not wrapped:  # BaseHTTPMiddleware would hide the disconnect: is_disconnected() would never return True
            await exchange(app, "/watches", [])
        await exchange(app, "/endless", [whole])

    runner.run(main())
    assert perf.metrics.flush()
    found = {name: each.cancelled_count for name, each in perf.metrics.snapshots().items()}
    assert found == {"GET /reads": 1, "GET /endless": 1} | ({} if wrapped else {"GET /watches": 1})


def test_disconnect_while_the_last_part_is_sent_is_no_cancellation(
    site: Site, perf: AgentPerf, runner: asyncio.Runner
) -> None:
    """A server may report the end of the connection before `send` returns."""
    app, ended = site(Route("/", in_parts("a"))).app, asyncio.Event()

    async def receive() -> Any:
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            ended.set()
            await asyncio.sleep(0.05)

    runner.run(app(scope_of("GET", "/", {}), receive, send))
    assert perf.metrics.flush()
    assert perf.metrics.snapshots()["GET /"].success_count == 1


def test_failed_sending_and_cancelled_request_are_cancellations(
    site: Site, perf: AgentPerf, runner: asyncio.Runner
) -> None:
    begun = asyncio.Event()

    async def hangs(request: Request) -> Response:
        begun.set()
        await asyncio.Event().wait()
        return PlainTextResponse("never")

    app = site(Route("/ok", ok), Route("/hangs", hangs)).app

    async def main() -> None:
        with pytest.raises(OSError, match="the client has left"):
            await exchange(app, "/ok", [], fail_after=1)
        request = asyncio.create_task(exchange(app, "/hangs", []))
        await begun.wait()
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()

    runner.run(main())
    assert perf.metrics.flush()
    found = {name: each.cancelled_count for name, each in perf.metrics.snapshots().items()}
    assert found == {"GET /ok": 1, "GET /hangs": 1}


def pool(perf: AgentPerf, capacity: int) -> Any:
    lb = perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=capacity))
    return lb


def test_request_without_capacity_is_answered_with_retry_after(
    perf: AgentPerf, site: Site, runner: asyncio.Runner
) -> None:
    lb = pool(perf, 1)

    @leased(lb, "coder")
    async def ask(request: Request) -> Response:
        return PlainTextResponse(request.state.lease.instance.id)

    async def own(request: Request) -> Response:
        async with lb.aio.lease("coder"):
            return PlainTextResponse("ok")

    def inner() -> Starlette:
        return Starlette(routes=[Route("/own", own)])

    browser = site(
        Route("/ask", ask),
        Mount("/inner", inner()),
        Mount("/wrapped", inner(), middleware=[Middleware(GZipMiddleware)]),
        Mount("/deep", routes=[Mount("/down", inner())]),
    )
    assert browser.get("/ask").text == "coder-1"
    held = lb.acquire("coder")
    lb.cool_down("coder", "coder-1", 90.5)
    for path in ("/ask", "/inner/own", "/wrapped/own", "/deep/down/own"):
        reply = browser.get(path)
        assert reply.status == 503
        assert 1 <= int(reply.headers["retry-after"]) <= 91
    lb.release(held)
    assert perf.metrics.flush()
    assert perf.metrics.snapshots()["GET /ask"].error_types == {"NoCapacity": 1}
    assert perf.metrics.snapshots()["GET /inner/own"].error_types == {"NoCapacity": 1}


def test_own_handler_of_the_application_stays_in_use(perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def busy(request: Request, error: Exception) -> Response:
        return PlainTextResponse("busy", 429)

    endpoint = leased(perf.balancer(), "nobody")(ok)
    app = Starlette(routes=[Route("/", endpoint)], exception_handlers={NoCapacity: busy})
    instrument(app, perf)
    assert Browser(runner, app).get("/").status == 429


def test_lease_is_held_until_the_stream_was_sent(perf: AgentPerf, site: Site, runner: asyncio.Runner) -> None:
    lb, loads = pool(perf, 9), []

    async def load() -> int:
        (status,) = await lb.aio.status("coder")
        return sum(each.instance.current_load for each in status.instances)

    async def body() -> AsyncIterator[str]:
        loads.append(await load())
        yield "a"
        loads.append(await load())

    @leased(lb, "coder")
    def streams(request: Request) -> Response:
        return StreamingResponse(body())

    class Page(HTTPEndpoint):
        @leased(lb, "coder")
        async def get(self, request: Request) -> Response:
            raise HTTPException(404)

        @leased(lb, "coder")
        async def post(self, request: Request) -> Response:
            raise HTTPException(502)

    browser = site(Route("/", streams), Route("/page", Page))
    assert browser.get("/").text == "a"
    assert browser.get("/page").status == 404
    assert browser.post("/page").status == 502
    loads.append(runner.run(load()))
    assert loads == [1, 1, 0]
    (status,) = lb.status("coder")
    assert (status.instances[0].served, status.instances[0].failed) == (1, 1), "404 is not the instance's fault"


def test_nested_applications_count_a_request_once(perf: AgentPerf, runner: asyncio.Runner) -> None:
    inner, outer = Starlette(routes=[Route("/{x}", ok)]), Starlette()
    instrument(inner, perf)
    instrument(outer, perf)
    instrument(outer, perf)
    outer.mount("/inner", inner)
    assert Browser(runner, outer).get("/inner/1").status == 200
    assert Browser(runner, inner).get("/1").status == 200
    assert counts(perf) == {"GET /inner/{x}": 1, "GET /{x}": 1}


def test_websockets_are_not_tracked_and_closed_without_capacity(
    perf: AgentPerf, site: Site, runner: asyncio.Runner
) -> None:
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        async with perf.balancer().aio.lease("nobody"):
            raise AssertionError

    app = site(WebSocketRoute("/chat", chat)).app
    sent = runner.run(exchange(app, "/chat", [{"type": "websocket.connect"}], kind="websocket"))
    assert [(each["type"], each.get("code")) for each in sent] == [
        ("websocket.accept", None),
        ("websocket.close", 1013),
    ]
    assert counts(perf) == {}


def test_websocket_holds_a_lease_while_its_endpoint_runs(perf: AgentPerf, site: Site, runner: asyncio.Runner) -> None:
    lb = pool(perf, 1)

    @leased(lb, "coder")
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(socket.state.lease.instance.id)
        assert await lb.aio.acquire("coder") is None

    app = site(WebSocketRoute("/chat", chat)).app
    sent = runner.run(exchange(app, "/chat", [{"type": "websocket.connect"}], kind="websocket"))
    assert sent[-1]["text"] == "coder-1"
    held = lb.acquire("coder")
    assert lb.release(held)


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (None, 0),
        (WebSocketException(1008), 0),
        (WebSocketException(1011), 1),
        (RuntimeError("the instance is broken"), 1),
    ],
    ids=["client left", "client refused", "internal error", "error"],
)
def test_instance_is_not_to_blame_for_clients_of_websockets(
    perf: AgentPerf, site: Site, runner: asyncio.Runner, error: Exception | None, failed: int
) -> None:
    lb = pool(perf, 1)

    @leased(lb, "coder")
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        if error is not None:
            raise error
        await socket.receive_text()  # raises WebSocketDisconnect

    app = site(WebSocketRoute("/chat", chat)).app
    received = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}]
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        runner.run(exchange(app, "/chat", received, kind="websocket"))
    (status,) = lb.status("coder")
    assert (status.instances[0].failed, status.instances[0].instance.current_load) == (failed, 0)


def test_end_of_the_lifespan_flushes(
    perf: AgentPerf, site: Site, runner: asyncio.Runner, counted: Any, raw: Any
) -> None:
    perf.metrics.record_execution("worker", 0.1, success=True)
    sent: list[tuple[str, int]] = []

    async def main() -> None:
        messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append((message["type"], counted()))

        await site(Route("/", ok)).app({"type": "lifespan", "asgi": {}}, receive, send)

    runner.run(main())
    assert sent[-1] == ("lifespan.shutdown.complete", 1)


def test_failing_template_does_not_hide_the_error(perf: AgentPerf, site: Site) -> None:
    class Odd(BaseRoute):
        def matches(self, scope: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        site(Odd()).get("/")
    assert perf.metrics.flush()
    assert perf.metrics.snapshots()["unmatched"].error_types == {"ZeroDivisionError": 1}


@pytest.mark.parametrize(
    ("argument", "value"), [("app", plain), ("perf", None), ("prefix", 5), ("prefix", "\n"), ("skip", "/health")]
)
def test_invalid_arguments_are_named(perf: AgentPerf, argument: str, value: Any) -> None:
    given: dict[str, Any] = {"app": Starlette(), "perf": perf, argument: value}
    with pytest.raises(InvalidArgument, match=f"^{argument} is"):
        instrument(given.pop("app"), given.pop("perf"), **given)


def test_invalid_leases_are_refused_at_once(perf: AgentPerf) -> None:
    with pytest.raises(InvalidArgument, match="balancer"):
        leased(perf, "coder")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="agent_type"):
        leased(perf.balancer(), "")
    with pytest.raises(InvalidArgument, match="wait"):
        leased(perf.balancer(), "coder", wait=-1)
