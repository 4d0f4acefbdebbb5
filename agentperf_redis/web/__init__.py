"""The web page of a namespace: `app` makes an ASGI application that a Starlette or FastAPI application can mount.

    from agentperf_redis import AgentPerf
    from agentperf_redis.web import app

    perf = AgentPerf("redis://localhost:6379/0")
    application.mount("/agentperf", app(perf, hosts=["ops.example.com"]))

Needs the extra ``web``. `agentperf serve` runs the same application on a server of its own.

What the handler of a page (`agentperf_redis.web.pages`) finds in its request:

- ``request.app.state.views``: a `Reader`. Its methods are those of `agentperf_redis.views`, and all pages share its
  reads.
- ``request.app.state.settings``: the `Settings`, for example the refresh interval.
- ``request.state.csrf``: the token that each form sends as field ``csrf``; empty if there are no actions.
- ``request.state.actions``: whether forms for actions are shown. `actions` describes their fields.
- ``request.state.notice``: the result of an action, to be shown once and outside of ``<main>``; or "".

Templates are rendered by `templating.templates`. ``url_for`` in them returns a path without scheme and host. Names of
routes besides those of the pages: ``login``, ``logout``, ``action`` (``name="drain"``), ``live``, ``metrics`` and
``static`` (``path="style.css"``).
"""

from __future__ import annotations

from agentperf_redis.web.application import app

__all__ = ["app"]
