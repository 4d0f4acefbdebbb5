"""No count is lost when workers and web servers end their processes. Each test runs the real package.

Tests of packages that are not installed are skipped; the extra ``borders`` installs all of them. The file
tests/integration/metrics/test_process_ends.py makes the same check for the process models of the standard library.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentperf_redis.metrics.commands import FLUSH
from tests.support.programs import LIMIT_S, Programs
from tests.support.proxy import Proxy
from tests.support.servers import free_port, wait_until

pytestmark = [
    pytest.mark.thorough,  # each program takes seconds to start and to stop
    pytest.mark.servers("valkey"),  # the kind of server does not affect these tests
]

CELERY_APP = """
    import os
    from celery import Celery
    from agentperf_redis import AgentPerf

    app = Celery("tasks", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
    app.conf.update(task_default_queue=os.environ["AGENTPERF_NAMESPACE"], broker_connection_retry_on_startup=True,
                    worker_prefetch_multiplier=1)
    perf = AgentPerf(flush_on_sigterm={flush_on_sigterm})

    @app.task
    def work(number):
        with perf.metrics.track("worker"):
            return number
"""
CELERY_CLIENT = """
    import tasks
    results = [tasks.work.delay(number) for number in range({count})]
    assert [result.get(timeout=60) for result in results] == list(range({count}))
"""
COUNT = 20


def start_celery(programs: Programs, *options: str, flush_on_sigterm: bool = False) -> subprocess.Popen[bytes]:
    """Start a worker and return it when it has run `COUNT` tasks."""
    pytest.importorskip("celery")
    programs.write("tasks.py", CELERY_APP.format(flush_on_sigterm=flush_on_sigterm))
    programs.write("client.py", CELERY_CLIENT.format(count=COUNT))
    worker = programs.start("celery", "-A", "tasks", "worker", "--loglevel", "warning", *options)
    programs.run("client")
    return worker


@pytest.mark.parametrize("options", [["--max-tasks-per-child=1"], ["--max-tasks-per-child=3"], []], ids=" ".join)
def test_celery_prefork_children_flush_at_their_end(
    programs: Programs, counted: Callable[[], int], options: list[str]
) -> None:
    worker = start_celery(programs, "--concurrency=2", *options)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert counted() == COUNT


@pytest.mark.parametrize("pool", ["solo", "threads", "gevent"])
def test_celery_pools_in_one_process_flush_at_warm_shutdown(
    programs: Programs, counted: Callable[[], int], pool: str
) -> None:
    if pool == "gevent":
        pytest.importorskip("gevent")
    worker = start_celery(programs, f"--pool={pool}", "--concurrency=2")
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert counted() == COUNT


def test_celery_cold_shutdown_flushes_with_the_handler(programs: Programs, counted: Callable[[], int]) -> None:
    worker = start_celery(programs, "--concurrency=2", flush_on_sigterm=True)
    worker.send_signal(signal.SIGQUIT)
    worker.wait(LIMIT_S)
    assert counted() == COUNT


RQ_JOBS = """
    from agentperf_redis import AgentPerf

    perf = AgentPerf()

    def work(fails):
        with perf.metrics.track("worker"):
            if fails:
                raise ValueError("as the test wants")
"""
RQ_CLIENT = """
    import os
    from redis import Redis
    from rq import Queue
    queue = Queue(os.environ["AGENTPERF_NAMESPACE"], connection=Redis.from_url(os.environ["BROKER"]))
    for number in range({count}):
        queue.enqueue("jobs.work", number % 2 == 1)
"""


@pytest.mark.parametrize("kind", ["Worker", "SpawnWorker", "SimpleWorker"])
def test_rq_jobs_are_counted(programs: Programs, counted: Callable[[], int], namespace: str, kind: str) -> None:
    pytest.importorskip("rq")
    programs.write("jobs.py", RQ_JOBS)
    programs.write("client.py", RQ_CLIENT.format(count=6))
    programs.run("client")
    options = ("--burst", "--url", programs.broker, "--worker-class", f"rq.worker.{kind}", "--logging_level", "WARNING")
    programs.run("rq.cli", "worker", *options, namespace)
    assert counted() == 6


WEB_APP = """
    import asyncio
    from agentperf_redis import AgentPerf

    perf = AgentPerf()

    async def asgi(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        with perf.metrics.track("worker"):
            if scope["path"] == "/slow":
                print("slow request begins", flush=True)
                await asyncio.sleep(1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def wsgi(environ, start):
        with perf.metrics.track("worker"):
            pass
        start("200 OK", [("Content-Length", "2")])
        return [b"ok"]
"""


def get(port: int, path: str = "/") -> bool:
    """Return whether the web server answered the request with success."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as reply:
        return bool(reply.read() == b"ok")
    return False


def serve(
    programs: Programs, *words: str, arguments: str = "", app: str = WEB_APP, at_once: int = 1
) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start a web server and send it requests. Return the server, its port, and the number of answered requests."""
    pytest.importorskip(words[0])
    port = free_port()
    programs.write("web.py", app.replace("AgentPerf()", f"AgentPerf({arguments})"))
    web = programs.start(*(word.format(port=port) for word in words))
    wait_until(lambda: get(port), "the web server to answer")
    with ThreadPoolExecutor(at_once) as clients:
        return web, port, 1 + sum(clients.map(get, [port] * COUNT))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "words",
    [
        "uvicorn web:asgi --port {port}",
        "uvicorn web:asgi --port {port} --workers 2",
        "uvicorn web:asgi --port {port} --loop uvloop",
        "gunicorn web:wsgi -b 127.0.0.1:{port} -w 2",
        "gunicorn web:wsgi -b 127.0.0.1:{port} -w 2 --preload --threads 4",
        "gunicorn web:wsgi -b 127.0.0.1:{port} -w 2 -k gevent",
        "gunicorn web:wsgi -b 127.0.0.1:{port} -w 2 -k gevent --preload",
        "gunicorn web:asgi -b 127.0.0.1:{port} -w 2 -k uvicorn_worker.UvicornWorker",
        "hypercorn web:asgi -b 127.0.0.1:{port}",
    ],
)
def test_web_server_flushes_when_it_is_stopped(
    programs: Programs, counted: Callable[[], int], words: str, number: signal.Signals
) -> None:
    for name in ("uvloop", "gevent", "uvicorn_worker"):
        if name in words:
            pytest.importorskip(name)
    web, _, answered = serve(programs, *words.split())
    web.send_signal(number)
    assert web.wait(LIMIT_S) in (0, -number)
    assert counted() == answered == COUNT + 1


def test_uvicorn_counts_a_request_that_ends_during_shutdown(programs: Programs, counted: Callable[[], int]) -> None:
    web, port, answered = serve(programs, "uvicorn", "web:asgi", "--port", "{port}")
    with ThreadPoolExecutor(1) as clients:
        slow = clients.submit(get, port, "/slow")
        wait_until(lambda: programs.said("slow request begins"), "the slow request")
        web.terminate()
        assert slow.result(LIMIT_S)
    assert web.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == answered + 1


def test_hypercorn_with_several_workers_flushes_with_the_handler(
    programs: Programs, counted: Callable[[], int]
) -> None:
    """When one worker has ended, hypercorn sends SIGTERM to the others. They have the default action for SIGTERM."""
    words = "hypercorn web:asgi -b 127.0.0.1:{port} -w 3"
    web, _, answered = serve(programs, *words.split(), arguments="flush_on_sigterm=True")
    web.terminate()
    assert web.wait(LIMIT_S) == 0
    assert counted() == answered


GEVENT_APP = """
    import time
    from agentperf_redis import AgentInstance, AgentPerf

    perf = AgentPerf()
    balancer = perf.balancer()
    answers = perf.cache("answers", max_size=100, local_size=10)

    @answers.cached(ttl=60, soft_ttl=0.05, name="answer")
    def answer(number):
        time.sleep(0.05)
        return number

    def wsgi(environ, start):
        with perf.metrics.track("worker"):
            balancer.register_instance(AgentInstance("coder-1", "coder", max_capacity=2))
            with balancer.lease("coder", wait=20):
                assert answer(5) == 5
                time.sleep(0.05)
        assert perf.metrics.flush()
        start("200 OK", [("Content-Length", "2")])
        return [b"ok"]
"""


@pytest.mark.parametrize("options", ["", "--preload --config patched.py"], ids=["", "preload, patched first"])
def test_all_services_work_in_gevent_workers_of_gunicorn(
    programs: Programs, counted: Callable[[], int], options: str
) -> None:
    pytest.importorskip("gevent")
    programs.write("patched.py", "from gevent import monkey\n\nmonkey.patch_all()\n")
    words = ["gunicorn", "web:wsgi", "-b", "127.0.0.1:{port}", "-w", "2", "-k", "gevent", *options.split()]
    web, _, answered = serve(programs, *words, app=GEVENT_APP, at_once=10)
    web.terminate()
    assert web.wait(LIMIT_S) == 0
    assert answered == COUNT + 1, programs.log()
    assert counted() == answered
    assert "gevent replaced threads" not in programs.log()


GEVENT_PROGRAM = """
    from gevent import monkey, spawn

    monkey.patch_all()

    import signal
    import sys
    from agentperf_redis import AgentPerf
    from agentperf_redis.metrics import flusher

    flusher.CLOSE_S = 30.0  # on a busy machine, the test may need a long time to send the signal

    def end():
        print("told to end", flush=True)
        sys.exit(0)

    signal.signal(signal.SIGQUIT, lambda number, frame: spawn(end))
    perf = AgentPerf(deadline=30.0)
    perf.metrics.record_execution("worker", 0.1, True)
    print("at the end", flush=True)
"""


def test_exit_of_a_greenlet_does_not_end_the_last_flush(
    programs: Programs, proxy: Proxy, counted: Callable[[], int]
) -> None:
    """gunicorn's gevent worker does this: 0.1 s after SIGQUIT, even if its main greenlet ends earlier."""
    pytest.importorskip("gevent")
    programs.write("work.py", GEVENT_PROGRAM)
    held = proxy.hold(only=FLUSH, reset=False)
    program = programs.start("work", url=proxy.url)
    held.wait(LIMIT_S)
    wait_until(lambda: programs.said("at the end"), "the program to end")
    program.send_signal(signal.SIGQUIT)
    wait_until(lambda: programs.said("told to end"), "the greenlet to raise SystemExit")
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.5)
    held.deliver()
    assert program.wait(LIMIT_S) == 0, programs.log()
    assert programs.log().splitlines() == ["at the end", "told to end"]
    assert counted() == 1


def test_late_patch_of_gevent_is_named_with_its_remedy(programs: Programs) -> None:
    pytest.importorskip("gevent")
    words = "gunicorn web:wsgi -b 127.0.0.1:{port} -w 1 -k gevent --preload"
    web, _, _ = serve(programs, *words.split())
    web.terminate()
    assert web.wait(LIMIT_S) == 0
    warnings = [line for line in programs.log().splitlines() if "RuntimeWarning: gevent replaced threads" in line]
    assert len(warnings) == 1
    assert "Call gevent.monkey.patch_all() before the import" in warnings[0]
