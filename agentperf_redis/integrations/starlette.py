"""Starlette: every request is an execution, and the capacity of a pool limits endpoints.

    instrument(app, perf)  # after the other middlewares, so that all of them are measured

    @leased(perf.balancer(), "coder", wait=2)
    async def ask(request): ...  # request.state.lease is the lease

Each request is an execution of an agent such as ``GET /items/{id}``. It lasts until the last byte of the response, or
of a stream, was sent. Background work after the response is not part of it. The agent's name consists of the method and
the template of the route, and never contains the path of a request. In a mounted application, the template begins with
the path of the mount, even if the application uses another framework. Requests without a route are executions of the
agent ``unmatched``.

A request fails if an exception leaves the application, or if the status is 500 or higher (``HTTP 502``). A lower status
is a success, since errors below 500 are the client's fault. A request counts as cancelled if the server cancels it, or
if the application notices that the client has left. The application notices this in ``request.stream()`` and
``is_disconnected()``, and when it sends a part of a stream. WebSockets are not tracked, since they last as long as
their clients want: track the handling of each message instead.

`NoCapacity` is answered with 503 and the header Retry-After, and counts as a failure with the type `NoCapacity`. An
application that is mounted after the call of `instrument` needs its own call. Even so, no request counts twice.

Nothing is lost if the server ends all requests before it ends the application, because the end of the ASGI lifespan
flushes all records. The README's table of losses lists the cases that need a hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Unpack

from agentperf_redis import arguments, process_end
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.errors import InvalidArgument, NoCapacity
from agentperf_redis.extras import extra
from agentperf_redis.integrations._leases import LeaseOptions, check_lease
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.spans import Span

with extra("starlette"):
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException, WebSocketException
    from starlette.requests import ClientDisconnect, HTTPConnection
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import BaseRoute, Match
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketDisconnect

_log = logging.getLogger("agentperf_redis")

UNMATCHED: Final = "unmatched"
"""The agent of requests that no route matches."""
_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""The methods that are counted by name. All others count as ``OTHER``, since clients can send any text as a method."""
_SERVER_ERROR: Final = 500
_INTERNAL_ERROR: Final = 1011
_TRY_AGAIN_LATER: Final = 1013
"""Close codes of a WebSocket."""
_BODY: Final = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})
"""Types of the messages that carry the body. Messages of the type pathsend have no field `more_body`."""
_EXCHANGE: Final = "agentperf_redis.exchange"
"""Key under which the scope of a request holds its `_Exchange`."""


def instrument(app: Starlette, perf: AgentPerf, *, prefix: str = "", skip: Collection[str] = ()) -> None:
    """Track the requests of an application, and answer `NoCapacity` with 503 and Retry-After.

    Call it before the application starts, after the last `add_middleware`. The call also prepares the applications that
    are already mounted. If an application has its own handler for `NoCapacity`, that handler stays in use.

    Args:
        app: the application.
        perf: records the requests.
        prefix: the beginning of each agent's name. It keeps several applications in one namespace apart.
        skip: templates of routes that are not tracked, such as ``/health``.

    Raises:
        InvalidArgument: for an invalid argument.
        RuntimeError: if the application has already started.
    """
    add_to(app, perf, Templates(), prefix, skip, lambda text: PlainTextResponse(text, 503))


def leased(
    balancer: LoadBalancer, agent_type: str, **options: Unpack[LeaseOptions]
) -> Callable[[Callable[..., Any]], Callable[..., Awaitable[ASGIApp | None]]]:
    """Return a decorator of endpoints: a request holds a lease until its whole response or stream was sent.

    If the response has background tasks, the request holds the lease until they have run. Errors of the client, such as
    an HTTPException below 500 or a WebSocket that the client closes, do not count against the instance.

    The endpoint finds the lease as ``request.state.lease``. It may be a method of an HTTPEndpoint, or a function. The
    function may be blocking, and may handle a WebSocket.

    Args:
        balancer: grants the leases.
        agent_type: the pool.
        options: as for `LoadBalancer.lease`.

    Returns:
        The decorator. A decorated endpoint raises NoCapacity if no unit is free; `instrument` answers this with 503.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    check_lease(balancer, agent_type, options)

    def decorator(endpoint: Callable[..., Any]) -> Callable[..., Awaitable[ASGIApp | None]]:
        asynchronous = arguments.is_coroutine_function(endpoint)

        @functools.wraps(endpoint)
        async def with_lease(*args: Any) -> ASGIApp | None:
            request: HTTPConnection = args[-1]
            async with contextlib.AsyncExitStack() as stack:
                lease = await stack.enter_async_context(held(balancer, agent_type, options))
                request.state.lease = lease
                response = await (endpoint(*args) if asynchronous else run_in_threadpool(endpoint, *args))
                # The endpoint of a WebSocket returns None.
                return None if response is None else _until_sent(response, stack.pop_all())

        return with_lease

    return decorator


def _until_sent(response: ASGIApp, stack: contextlib.AsyncExitStack) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async with stack:
            await response(scope, receive, send)

    return answer


@contextlib.asynccontextmanager
async def held(
    balancer: LoadBalancer,
    agent_type: str,
    options: LeaseOptions,
    refusals: tuple[type[Exception], ...] = (),
) -> AsyncIterator[Lease]:
    """Hold a lease during a request or a WebSocket. Errors of the client do not count against the instance.

    Args:
        balancer: grants the lease.
        agent_type: the pool.
        options: as for `LoadBalancer.lease`.
        refusals: further exceptions that the framework raises for an invalid request of the client.
    """
    async with balancer.aio.lease(agent_type, **options) as lease:
        try:
            yield lease
        except Exception as error:
            if lease.outcome is None and (isinstance(error, refusals) or _is_of_client(error)):
                lease.outcome = Outcome.NEUTRAL
            raise


def _is_of_client(error: Exception) -> bool:
    if isinstance(error, HTTPException):
        return error.status_code < _SERVER_ERROR
    if isinstance(error, WebSocketException):
        return error.code != _INTERNAL_ERROR
    return isinstance(error, (ClientDisconnect, WebSocketDisconnect))


def add_to(
    app: Starlette,
    perf: AgentPerf,
    templates: Templates,
    prefix: str,
    skip: Collection[str],
    refusal: Callable[[str], Response],
) -> None:
    """Do the work of `instrument`, for Starlette and for every framework that is built on it.

    Args:
        app: the application.
        perf: records the requests.
        templates: finds the templates of routes.
        prefix: begins the name of each agent.
        skip: templates of routes that are not tracked.
        refusal: returns the response, with the given text, to a request that gets no capacity.
    """
    if not isinstance(app, Starlette):
        raise InvalidArgument("app", app, "an application of Starlette or FastAPI")
    checked_perf(perf)
    if prefix != "":
        arguments.name("prefix", prefix)
    options = _Options(perf.metrics, templates, prefix, frozenset(arguments.names("skip", skip)))
    app.add_middleware(_Tracking, options=options)
    _answer_no_capacity(app, refusal)


def _answer_no_capacity(app: Starlette, refusal: Callable[[str], Response]) -> None:
    async def refuse(connection: HTTPConnection, error: NoCapacity) -> Response | None:
        if isinstance(connection, WebSocket):
            await connection.close(_TRY_AGAIN_LATER, "no capacity")
            return None
        exchange = connection.scope.get(_EXCHANGE)
        if exchange is not None:
            exchange.error_type = NoCapacity.__name__
        response = refusal("no capacity, try again later")
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        return response

    app.exception_handlers.setdefault(NoCapacity, refuse)
    for mounted in _mounted_on(app.routes):
        mounted.exception_handlers.setdefault(NoCapacity, refuse)


def _mounted_on(routes: Iterable[BaseRoute]) -> Iterator[Starlette]:
    for route in routes:
        # A Mount with middlewares keeps its application in `_base_app`. The `app` of such a Mount is the outermost
        # middleware.
        mounted = getattr(route, "_base_app", getattr(route, "app", None))
        if isinstance(mounted, Starlette):
            yield mounted
        yield from _mounted_on(_routes_of(route))


def _routes_of(route: BaseRoute) -> Sequence[BaseRoute]:
    """Return Starlette's routes within a route. Applications of other frameworks may have `routes` of another type."""
    routes = getattr(route, "routes", None)
    return routes if isinstance(routes, Sequence) and routes and isinstance(routes[0], BaseRoute) else ()


class Templates:
    """Finds the templates of routes."""

    def find(self, routes: Sequence[BaseRoute], scope: Scope) -> str | None:
        """Return the template, such as ``/items/{id}``, of the route that will get a request; None if none will."""
        partial = None
        for route in routes:
            match, child_scope = route.matches(scope)
            if match is not Match.NONE:
                found = self._template(route, scope, child_scope)
                if match is Match.FULL:
                    return found
                partial = partial or found  # the route matches the path of the request, but not the method
        return partial

    def _template(self, route: BaseRoute, scope: Scope, child_scope: Scope) -> str:
        path: str = getattr(route, "path_format", "/{path}")
        inner = _routes_of(route)
        if not inner:
            return path
        # The path of a Mount ends with /{path}. A Host has no path, so `path` is the default /{path}.
        rest = self.find(inner, {**scope, **child_scope}) or "/{path}"
        return path.removesuffix("/{path}") + rest


@dataclass(frozen=True, slots=True)
class _Options:
    metrics: MetricsCollector
    templates: Templates
    prefix: str
    skip: frozenset[str]

    def template(self, scope: Scope) -> str | None:
        try:
            return self.templates.find(scope["app"].routes, dict(scope))
        except Exception:  # noqa: BLE001  the converter of a parameter failed; the router will raise the same error
            _log.debug("no template for a request", exc_info=True)
            return None

    def name(self, template: str | None, scope: Scope) -> str:
        if template is None:
            return self.prefix + UNMATCHED
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        return arguments.nearest_name(f"{self.prefix}{method} {template}")


class _Tracking:
    """The middleware."""

    def __init__(self, app: ASGIApp, options: _Options) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, functools.partial(_send_of_lifespan, send))
            return
        if scope["type"] == "http" and _EXCHANGE not in scope:
            template = self._options.template(scope)
            if template not in self._options.skip:
                span = self._options.metrics.track(self._options.name(template, scope))
                await _Exchange(span, receive, send).run(self._app, scope)
                return
        await self._app(scope, receive, send)


async def _send_of_lifespan(send: Send, message: Message) -> None:
    if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
        await process_end.aflush_all()
    await send(message)


class _Exchange:
    """One request and its response.

    Attributes:
        error_type: the name of the exception that a handler has turned into a response; None if there was none.
    """

    def __init__(self, span: Span, receive: Receive, send: Send) -> None:
        self.error_type: str | None = None
        self._span = span
        self._receive = receive
        self._send = send
        self._status = 0
        self._complete = False
        self._client_left = False
        self._over = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        scope[_EXCHANGE] = self
        self._span.__enter__()
        try:
            await app(scope, self._received, self._sent)
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    async def _received(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._client_left = True
        return message

    async def _sent(self, message: Message) -> None:
        last = message["type"] in _BODY and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif last:
            self._complete = True  # from now on, a disconnect message does not count as a cancellation
        try:
            await self._send(message)
        except OSError:  # ASGI specifies that a server raises OSError if the client has left
            self._client_left, self._complete = True, False
            raise
        if last:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        if isinstance(error, ClientDisconnect) or (self._client_left and (error is None or isinstance(error, OSError))):
            error = asyncio.CancelledError()
        elif error is None and (self._status >= _SERVER_ERROR or self.error_type is not None):
            self._span.fail(self.error_type or f"HTTP {self._status}")
        elif error is None and not self._complete:
            self._span.fail("incomplete response")
        self._span.__exit__(None if error is None else type(error), error, None)
