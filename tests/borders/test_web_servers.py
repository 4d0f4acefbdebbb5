"""Instrumented applications on real web servers: no request is lost when a server ends or a client leaves."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from tests.support.programs import LIMIT_S, Programs
from tests.support.recipes import recipe
from tests.support.servers import free_port, wait_until

pytestmark = [
    pytest.mark.thorough,  # each server takes seconds to start and to stop
    pytest.mark.servers("valkey"),  # one kind of data server is enough for these tests of web servers
]

STARLETTE_APP = """
    import asyncio

    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Mount, Route

    from agentperf_redis import AgentPerf
    from agentperf_redis.integrations.starlette import instrument, leased

    perf = AgentPerf()

    @leased(perf.balancer(), "coder", wait=30)
    async def ask(request):
        return PlainTextResponse(request.state.lease.instance.id)

    async def endless(request):
        async def body():
            while True:
                yield "x" * 1000
                await asyncio.sleep(0.01)
        return StreamingResponse(body())

    app = Starlette(routes=[Mount("/v1", routes=[Route("/ask/{topic}", ask)]), Route("/endless", endless)])
    instrument(app, perf)
"""
FASTAPI_APP = """
    from fastapi import APIRouter, Depends, FastAPI

    from agentperf_redis import AgentPerf
    from agentperf_redis.integrations.fastapi import instrument, leased

    app, router, perf = FastAPI(), APIRouter(), AgentPerf()

    @router.get("/ask/{topic}")
    async def ask(topic: str, lease = Depends(leased(perf.balancer(), "coder", wait=30))):
        return lease.instance.id

    app.include_router(router, prefix="/v1")
    instrument(app, perf)
"""
COUNT = 40


def status_of(port: int, path: str) -> int:
    """Return the status of the answer to a request, or 0 if there was none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def serve(programs: Programs, source: str, words: str) -> tuple[subprocess.Popen[bytes], int]:
    for name in (words.split(maxsplit=1)[0], "fastapi" if "fastapi" in source else "starlette"):
        pytest.importorskip(name, reason="needs the extra borders")
    if "uvicorn_worker" in words:
        pytest.importorskip("uvicorn_worker", reason="needs the extra borders")
    port = free_port()
    programs.write("web.py", source)
    web = programs.start(*words.format(port=port).split())

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    wait_until(listens, "the web server to listen", timeout=60)
    return web, port


@pytest.fixture
def coder(perf: AgentPerf) -> None:
    perf.balancer().register_instance(AgentInstance("coder-1", "coder", max_capacity=4))


def ask(port: int, path: str) -> list[int]:
    with ThreadPoolExecutor(8) as clients:
        return list(clients.map(status_of, [port] * COUNT, [f"{path}/{number}" for number in range(COUNT)]))


@pytest.mark.usefixtures("coder")
@pytest.mark.parametrize("source", [STARLETTE_APP, FASTAPI_APP], ids=["starlette", "fastapi"])
@pytest.mark.parametrize(
    "words",
    [
        "uvicorn web:app --port {port} --workers 2",
        "gunicorn web:app -b 127.0.0.1:{port} -w 2 -k uvicorn_worker.UvicornWorker",
        "hypercorn web:app -b 127.0.0.1:{port}",
    ],
    ids=lambda words: words.split()[0],
)
def test_stopped_server_has_counted_every_request(programs: Programs, perf: AgentPerf, source: str, words: str) -> None:
    web, port = serve(programs, source, words)
    assert ask(port, "/v1/ask") == [200] * COUNT
    web.terminate()
    assert web.wait(LIMIT_S) in (0, -signal.SIGTERM)
    assert {name: found.success_count for name, found in perf.metrics.snapshots().items()} == {
        "GET /v1/ask/{topic}": COUNT
    }


def test_web_recipe_counts_every_request(programs: Programs, perf: AgentPerf) -> None:
    web, port = serve(programs, recipe("fastapi"), "uvicorn web:app --port {port} --workers 2")
    refused = status_of(port, "/ask/nobody")
    perf.balancer().register_instance(AgentInstance("coder-1", "coder", max_capacity=4))
    answered = ask(port, "/ask")
    web.terminate()
    assert web.wait(LIMIT_S) in (0, -signal.SIGTERM)
    assert (refused, answered) == (503, [200] * COUNT)
    (found,) = perf.metrics.snapshots().values()
    assert (found.agent_name, found.success_count) == ("GET /ask/{topic}", COUNT)
    assert found.error_types == {"NoCapacity": 1}


@pytest.mark.parametrize(
    "words",
    ["uvicorn web:app --port {port}", "hypercorn web:app -b 127.0.0.1:{port}"],
    ids=lambda words: words.split()[0],
)
def test_departed_client_of_a_stream_is_a_cancellation(programs: Programs, perf: AgentPerf, words: str) -> None:
    web, port = serve(programs, STARLETTE_APP, words)
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in client.recv(100)
    wait_until(lambda: "GET /endless" in perf.metrics.snapshots(), "the cancelled request to be counted", timeout=60)
    assert perf.metrics.snapshots()["GET /endless"].cancelled_count == 1
    web.terminate()
    assert web.wait(LIMIT_S) in (0, -signal.SIGTERM)
