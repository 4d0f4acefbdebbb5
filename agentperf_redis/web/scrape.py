"""`/metrics`, as `agentperf exporter` serves it, under the same rules as the pages."""

from __future__ import annotations

from http import HTTPStatus

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response


async def metrics(request: Request) -> Response:
    """Answer a scraper of Prometheus."""
    from agentperf_redis.export.prometheus import Exporter

    state, headers = request.app.state, request.headers
    exporter = Exporter(state.perf)
    accept, encoding = headers.get("accept", ""), headers.get("accept-encoding", "")
    status, fields, body = await state.views.shared.get(
        ("metrics", accept, encoding),
        lambda: run_in_threadpool(exporter.answer, "GET", "/metrics", accept, encoding),
    )
    answer = Response(b"" if request.method == "HEAD" else body, status or HTTPStatus.OK)
    for name, value in fields:
        answer.headers[name] = value
    return answer
