"""Makes the ASGI application of the web page."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.web import actions, login, scrape
from agentperf_redis.web.live import Live, live
from agentperf_redis.web.reader import Reader
from agentperf_redis.web.security import Guard
from agentperf_redis.web.sessions import Sessions
from agentperf_redis.web.settings import REFRESH_S, Settings, checked
from agentperf_redis.web.templating import FOLDER

_MIN_COMPRESSED = 500
_COMPRESSION = 6


def app(
    perf: AgentPerf,
    *,
    token: str | None = None,
    allow_actions: bool = False,
    hosts: Sequence[str] | None = None,
    refresh: float = REFRESH_S,
) -> Starlette:
    """Make an ASGI application that shows a namespace. It may be mounted at any path of another application.

    The application reads only, unless `allow_actions` is set. It does not close `perf`.

    Args:
        perf: the server and the namespace.
        token: the secret with which users log in, 16 to 512 characters. With None, there is no login. The outer
            application, or the address on which it listens, must then keep others out.
        allow_actions: whether the pages have forms that change something: silence an alert, drain an instance, mark it
            healthy or unhealthy, delete a key, invalidate a tag, clear a cache.
        hosts: host names, without a port, under which the pages may be requested in addition to those of the loopback
            interface; ``"*"`` allows all names. None allows all names if there is a token, and otherwise only those of
            the loopback interface. Without this check, a page of another site could read these pages through a name of
            that site that resolves to this server (DNS rebinding).
        refresh: time between two reads, s. Pages that need the same data within this time share one read.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    from agentperf_redis.web import pages

    checked_perf(perf)
    return build(perf, checked(token, allow_actions=allow_actions, hosts=hosts, refresh=refresh), pages.routes())


def build(perf: AgentPerf, settings: Settings, pages: Sequence[BaseRoute]) -> Starlette:
    """Make the application of these pages."""
    # The seed must not contain the server's password. Each visitor gets a cookie with a code that is derived from the
    # seed. If the seed contained a short password, a visitor could use this code to guess the password.
    sessions = Sessions(settings.token, f"{perf.backend.address.masked} {perf.backend.namespace}")
    made = Starlette(
        routes=[
            *pages,
            *login.routes(),
            *actions.routes(),
            Route("/live", live, name="live"),
            Route("/metrics", scrape.metrics, name="metrics"),
            Mount("/static", StaticFiles(directory=FOLDER / "static", check_dir=False), name="static"),
        ],
        middleware=[
            Middleware(Guard, settings=settings, sessions=sessions),
            Middleware(GZipMiddleware, minimum_size=_MIN_COMPRESSED, compresslevel=_COMPRESSION),
        ],
    )
    made.state.settings = settings
    made.state.sessions = sessions
    made.state.pages = tuple(pages)
    made.state.views = Reader(perf, settings.refresh_s)
    made.state.live = Live(settings.refresh_s)
    made.state.perf = perf
    return made
