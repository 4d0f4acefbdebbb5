"""Tests of the test tools: they must behave as the other tests assume."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import redis

from agentperf_redis.command import Batch, Command, Flow, Pause, Wait, WakeUp
from agentperf_redis.errors import CorruptState
from agentperf_redis.script import Script
from tests.support.calls import Call
from tests.support.fake import Fake
from tests.support.places import ROOT
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, Servers, gone, wait_until
from tests.support.workers import WorkerFailed, Workers

pytestmark = pytest.mark.privileged  # these tests send commands that no worker needs


def _client(url: str, **options: object) -> Raw:
    """Return a client that never retries."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    settings = {"decode_responses": True, "protocol": 2, "retry": Retry(NoBackoff(), 0), **options}
    return redis.Redis.from_url(url, **settings)


def test_server_runs_the_announced_version(server: Server, raw: Raw, namespace: str) -> None:
    raw.set(f"{namespace}:{{a}}:x", "1")
    assert raw.get(f"{namespace}:{{a}}:x") == "1"
    for slot in "bcdef":
        raw.set(f"{namespace}:{{{slot}}}:x", "1")
    assert len(raw.keys(f"{namespace}:*")) == 6
    versions = {"valkey": "7.2.4", "redis82": "8.2", "redis70": "7.", "cluster": "7.2.4"}  # `redis_version` in INFO
    with server.nodes[0].client() as client:
        info = client.info("server")
    assert info["redis_version"].startswith(versions[server.kind])
    assert info["process_id"] == server.nodes[0].process.pid


def test_killed_server_with_aof_keeps_its_data(start_server: Callable[..., Server]) -> None:
    for aof, expected in ((True, "kept"), (False, None)):
        server = start_server("valkey", aof=aof)
        with server.client() as client:
            client.set("key", "kept")
        port = server.port
        server.restart()
        assert server.port == port
        with server.client() as client:
            assert client.get("key") == expected


def test_paused_server_answers_only_after_resume(own_server: Server) -> None:
    with own_server.client() as patient, own_server.client(socket_timeout=0.1) as client:
        assert patient.ping()
        own_server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_server.resume()
        assert patient.ping()


def test_dead_or_paused_server_recovers(servers: Servers) -> None:
    server = servers.fresh("valkey")
    server.pause()
    server.recover()
    server.kill()
    assert not server.healthy
    server.recover()
    with server.client() as client:
        assert client.ping()
    server.stop()


def test_servers_end_with_the_test_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from tests.support.servers import Server; server = Server('valkey');"
        "print(server.nodes[0].process.pid, server.nodes[0].folder, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert not gone(int(pid))
        parent.kill()
    wait_until(lambda: gone(int(pid)), "the orphan to be killed")
    shutil.rmtree(folder)


_LEAK = """
import subprocess, sys
from tests.support import leftovers
leftovers.END_PATIENCE_S = 0.1
from agentperf_redis import embedded
def test_leak(tmp_path):
    subprocess.Popen(["sleep", "60"], start_new_session=True).returncode = 0   # no ResourceWarning
    embedded.ensure(tmp_path)
"""


@pytest.mark.thorough
def test_session_fails_and_names_leftover_processes(tmp_path: Path) -> None:
    (tmp_path / "test_leak.py").write_text(_LEAK)
    words = [
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    named = re.findall(r"ERROR: this session left process (\d+) running: (\S+)", done.stdout)
    for pid, _ in named:
        os.kill(int(pid), signal.SIGKILL)
    assert sorted(Path(program).name for _, program in named) == ["sleep", "valkey-server"]
    assert "1 passed" in done.stdout
    (socket,) = re.findall(r"unixsocket:(\S+)", done.stdout)
    Path(socket).unlink()


def _all_steps() -> Flow[list[object]]:
    """A flow with all kinds of steps. One step fails, and the flow catches the error."""
    meta = "fake:meta"
    opened = Command(Script("namespace/open"), (meta,), {"schema": 1, "epoch": "epoch"}, _second)
    try:
        yield from Command("HGET", (meta,), ("no such field",), _refuse)
    except CorruptState as error:
        yield from Pause(0.5)
        first = yield from opened
        both = yield from Batch((opened, Command("HGET", (meta,), ("epoch",), _same)))
        settled = yield from Batch((opened, Command("HGET", (meta,), ("epoch",), _refuse))).settled()
        woken = yield from Wait(WakeUp(), 1.5)
        return [error.key, first, both, type(settled[1]), woken]
    return []


def _second(reply: Any) -> object:
    return reply[1]


def _same(reply: object) -> object:
    return reply


def _refuse(reply: object) -> object:
    raise CorruptState("fake:meta", repr(reply))


def test_fake_runs_commands_batches_and_flows(fake: Fake) -> None:
    assert fake.run(_all_steps()) == ["fake:meta", 1, [1, b"epoch"], CorruptState, False]
    assert fake.pauses == [0.5, 1.5]
    assert fake.client.hget("fake:meta", "epoch") == "epoch"
    assert fake.run(Command("HGET", ("fake:meta",), ("schema",), int)) == 1
    assert fake.run(Batch((Command("HGET", ("fake:meta",), ("schema",), int),))) == [1]
    with pytest.raises(CorruptState):
        fake.run(Command("HGET", ("fake:meta",), ("schema",), _refuse))


class _Greeter:
    """A minimal client: blocking methods, and the same methods on `aio`."""

    def __init__(self) -> None:
        self.aio = _AsyncGreeter()

    def greet(self, name: str) -> str:
        return f"hello {name}"


class _AsyncGreeter:
    async def greet(self, name: str) -> str:
        return f"hello {name} from a loop"


def test_call_runs_blocking_and_async(call: Call) -> None:
    assert call(_Greeter(), "greet", "you") == ("hello you from a loop" if call.is_async else "hello you")


def test_proxy_loses_reply_of_executed_request(proxy: Proxy, raw: Raw, namespace: str) -> None:
    fault = proxy.reset_after_reply(only="INCRBY", nth=2)
    with _client(proxy.url) as client:
        assert client.incr(namespace) == 1
        with pytest.raises(redis.ConnectionError):
            client.incr(namespace)
        assert raw.get(namespace) == "2"
        assert client.incr(namespace) == 3
    assert [request[0] for request in fault.requests] == [b"INCRBY"]
    assert proxy.count("INCRBY") == 3


def test_proxy_loses_request_before_execution(proxy: Proxy, raw: Raw, namespace: str) -> None:
    proxy.reset_before_request(times=2)
    with _client(proxy.url) as client:
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.incr(namespace)
        assert raw.get(namespace) is None
        assert client.incr(namespace) == 1


def test_proxy_delivers_half_a_reply(proxy: Proxy, raw: Raw, namespace: str) -> None:
    raw.set(namespace, "a long value")
    proxy.half_reply()
    with _client(proxy.url) as client, pytest.raises(redis.ConnectionError):
        client.get(namespace)


@pytest.mark.thorough
def test_proxy_swallows_or_delays_reply(proxy: Proxy, raw: Raw, namespace: str) -> None:
    swallowed = proxy.swallow(only="INCRBY")
    proxy.delay(4.0, only="GET")
    kept = proxy.keep_reply(only="STRLEN")
    with _client(proxy.url, socket_timeout=1.0) as client, _client(proxy.url) as patient:
        with pytest.raises(redis.TimeoutError):
            client.incr(namespace)
        swallowed.wait()
        wait_until(lambda: raw.get(namespace) == "1", "the request to be executed")
        with pytest.raises(redis.TimeoutError):
            client.get(namespace)
        assert patient.get(namespace) == "1"
        with pytest.raises(redis.TimeoutError):
            client.strlen(namespace)
        assert kept.answered.wait(10)
        kept.let_go()
        assert patient.strlen(namespace) == 1


def test_held_request_arrives_after_client_left(proxy: Proxy, raw: Raw, namespace: str) -> None:
    held = proxy.hold(only="INCRBY")
    with _client(proxy.url) as client:
        with pytest.raises(redis.ConnectionError):
            client.incr(namespace)
        assert client.incr(namespace) == 1
    assert held.deliver() == b":2\r\n"
    assert raw.get(namespace) == "2"

    held = proxy.hold(only="INCRBY", after=0.05, reset=False)
    with _client(proxy.url) as client:
        assert client.incr(namespace) == 3
    assert held.delivered() == b":3\r\n"


def test_held_request_ends_with_the_proxy(server: Server, raw: Raw, namespace: str) -> None:
    proxy = Proxy(server.port)
    held = proxy.hold()
    with _client(proxy.url) as client, pytest.raises(redis.ConnectionError):
        client.incr(namespace)
    held.wait()
    proxy.close()
    assert raw.get(namespace) is None


def test_proxy_cuts_refuses_and_accepts_connections(proxy: Proxy) -> None:
    with _client(proxy.url) as client, _client(proxy.url, socket_timeout=0.1) as hurried:
        assert client.ping()
        (before,) = client.connection_pool._available_connections
        proxy.cut()
        with pytest.raises(redis.ConnectionError):
            before.can_read()
        assert client.ping()
        proxy.close_port()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
        proxy.open_port()
        assert client.ping()
        proxy.go_silent()
        with pytest.raises(redis.TimeoutError):
            hurried.ping()
        proxy.speak_again()
        assert client.ping()


def test_proxy_passes_messages_and_pipelines(proxy: Proxy, raw: Raw, namespace: str) -> None:
    with _client(proxy.url) as client, client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(namespace)
        wait_until(lambda: raw.publish(namespace, "hello"), "the subscription")
        heard: list[Any] = []

        def listen() -> bool:
            heard.extend(filter(None, [listener.get_message(timeout=1)]))
            return bool(heard)

        wait_until(listen, "the message")
        assert heard[0]["data"] == "hello"
        pipe = client.pipeline(transaction=True)
        for _ in range(3):
            pipe.rpush(namespace, "a b\r\n", "")
        assert pipe.execute() == [2, 4, 6]
        assert client.lrange(namespace, 0, 1) == ["a b\r\n", ""]


def _add(a: int, b: int) -> tuple[int, int]:
    return a + b, os.getpid()


def _fail() -> None:
    raise ValueError("no luck")


def _talk(name: str) -> Generator[str, int, int]:
    first = yield f"hello {name}"
    second = yield "and again"
    return first + second


def _sleep() -> Generator[str, None, None]:
    yield "about to sleep"
    time.sleep(600)


def test_workers_run_in_separate_processes(workers: Workers) -> None:
    results = workers.run(_add, [(1, 2), (3, 4)])
    assert [total for total, _ in results] == [3, 7]
    assert len({os.getpid(), *(pid for _, pid in results)}) == 3


_KILLED = """
import time
from tests.support.workers import Workers
if __name__ == "__main__":
    worker = Workers().start(time.sleep, 600)
    print(worker.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.thorough
def test_workers_end_with_the_test_process(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(_KILLED)
    words = [sys.executable, str(tmp_path / "main.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: gone(pid), "the worker to be killed")


def _environment() -> tuple[str | None, str]:
    return os.environ.get("OF_THIS_TEST"), str(Path.cwd())


def test_workers_get_environment_of_their_test(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in ("1", "2"):
        monkeypatch.setenv("OF_THIS_TEST", value)
        monkeypatch.chdir(tmp_path)
        assert workers.start(_environment).result() == (value, str(tmp_path))


@pytest.mark.thorough
def test_worker_talks_fails_and_can_be_killed(workers: Workers) -> None:
    talker = workers.start(_talk, "you")
    assert talker.said() == "hello you"
    talker.answer(1)
    assert talker.said() == "and again"
    talker.answer(2)
    assert talker.result() == 3

    with pytest.raises(WorkerFailed, match="no luck"):
        workers.start(_fail).result()

    sleeper = workers.start(_sleep)
    assert sleeper.said() == "about to sleep"
    sleeper.pause()
    sleeper.resume()
    sleeper.kill()
    with pytest.raises(WorkerFailed, match="exit code -9"):
        sleeper.said()
