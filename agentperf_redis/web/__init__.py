"""The web page of a namespace: `app` makes an ASGI application that a Starlette or FastAPI application can mount.

    from agentperf_redis import AgentPerf
    from agentperf_redis.web import app

    perf = AgentPerf("redis://localhost:6379/0")
    application.mount("/agentperf", app(perf, hosts=["ops.example.com"]))

Needs the extra ``web``. `agentperf serve` runs the same application on a server of its own.

The handler of a page (`agentperf_redis.web.pages`) gets a request with these attributes:

- ``request.app.state.views``: a `Reader`. It has the functions of `agentperf_redis.views` as methods. All pages share
  its reads.
- ``request.app.state.settings``: the `Settings`, for example the refresh interval.
- ``request.state.csrf``: the token that each form sends as field ``csrf``; empty if there are no actions.
- ``request.state.actions``: whether forms for actions are shown. `actions` describes their fields.
- ``request.state.notice``: the result of an action, which the page shows once, outside of ``<main>``; or "".

Templates are rendered by `templating.templates`. In templates, ``url_for`` returns a path without scheme and host. The
routes that are not pages are named ``login``, ``logout``, ``action`` (with ``name="drain"``, for example), ``live``,
``metrics`` and ``static`` (with ``path="style.css"``, for example).
"""

from __future__ import annotations

from agentperf_redis.web.application import app

__all__ = ["app"]
