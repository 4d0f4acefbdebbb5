"""FastAPI: every request is an execution, and the capacity of a pool limits endpoints.

    instrument(app, perf)  # after the other middlewares, so that all of them are measured

    @app.get("/ask")
    async def ask(lease: Annotated[Lease, Depends(leased(perf.balancer(), "coder", wait=2))]): ...

See `agentperf_redis.integrations.starlette` for what is recorded, what may be lost, and the response to a request if no
capacity is free. The template of a route includes the prefix passed to `include_router`. Requests for files of
`app.frontend` count as requests without a route.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Unpack

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.extras import extra
from agentperf_redis.integrations._leases import LeaseOptions, check_lease

with extra("fastapi"):
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.routing import iter_route_contexts
    from starlette.routing import BaseRoute
    from starlette.types import Scope

    from agentperf_redis.integrations.starlette import Templates, add_to, held

_REFUSALS: Final = (RequestValidationError, WebSocketRequestValidationError)
"""Errors that do not count as failures of the instance: FastAPI gets the lease before it refuses invalid parameters."""
_LISTED_EVERY_S: Final = 1.0
"""If a request matches no route, the routes are listed again, but at most once in this many seconds."""
_MAX_LISTS: Final = 256
"""Max lists of routes kept: one per mounted application. With unusual routes, each request might make a new list."""


def instrument(app: FastAPI, perf: AgentPerf, *, prefix: str = "", skip: Collection[str] = ()) -> None:
    """Track the requests of an application, and answer `NoCapacity` with 503 and Retry-After.

    See `agentperf_redis.integrations.starlette.instrument` for the arguments and errors. The answer is JSON, like
    that of an HTTPException.
    """
    add_to(app, perf, _Templates(), prefix, skip, lambda text: JSONResponse({"detail": text}, 503))


def leased(
    balancer: LoadBalancer, agent_type: str, **options: Unpack[LeaseOptions]
) -> Callable[[], AsyncIterator[Lease]]:
    """Return a dependency that holds a lease until the request or WebSocket has ended.

    A request ends when its response, or the whole stream, has been sent and the background tasks have run.
    Errors of the client, such as invalid parameters, do not count against the instance.

    Args:
        balancer: grants the leases.
        agent_type: the pool.
        options: as for `LoadBalancer.lease`.

    Returns:
        A function for `Depends`; the dependency is the lease. Without capacity, the function raises NoCapacity.
        `instrument` turns this error into an answer.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    check_lease(balancer, agent_type, options)

    async def lease() -> AsyncIterator[Lease]:
        async with held(balancer, agent_type, options, _REFUSALS) as granted:
            yield granted

    return lease


@dataclass(frozen=True, slots=True)
class _Listed:
    source: Sequence[BaseRoute]
    count: int
    listed_at: float
    targets: Sequence[Any]


class _Templates(Templates):
    """Finds the templates of routes.

    FastAPI's own list of routes has a single entry for an included router. So this class makes its own list, which has
    an entry for each route of the router.
    """

    def __init__(self) -> None:
        self._listed: dict[int, _Listed] = {}

    def find(self, routes: Sequence[BaseRoute], scope: Scope) -> str | None:
        listed = self._listed.get(id(routes))
        if listed is None or listed.source is not routes or listed.count != len(routes):
            listed = self._list(routes)
        found = super().find(listed.targets, scope)
        if found is None and time.monotonic() - listed.listed_at > _LISTED_EVERY_S:
            # An included router may have got new routes since the list was made.
            found = super().find(self._list(routes).targets, scope)
        return found

    def _list(self, routes: Sequence[BaseRoute]) -> _Listed:
        # A route context only forwards calls to its route, and the forwarding costs time. So list the route itself: it
        # is the object to which the method `context.matches` is bound.
        targets = tuple(getattr(context.matches, "__self__", context) for context in iter_route_contexts(routes))
        listed = _Listed(routes, len(routes), time.monotonic(), targets)
        if len(self._listed) >= _MAX_LISTS:
            self._listed.clear()
        self._listed[id(routes)] = listed
        return listed
