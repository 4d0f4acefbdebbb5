"""Tests of the command `agentperf serve`, as a program of its own and in this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import agentperf_redis
from agentperf_redis import AgentPerf
from tests.support.commandline import FAILURE, USAGE, Run
from tests.support.places import ROOT
from tests.support.servers import Server, wait_until

LIMIT_S = 60.0
"""Seconds that a program may take to start, to answer or to end on a loaded machine."""
TOKEN = "correct-horse-battery"


class Site:
    """A running `agentperf serve`.

    Attributes:
        program: its process.
        document: the JSON document that the program printed.
    """

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self.program = program
        assert program.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = program.stdout.readline()
            assert line, "the program has ended"
            text += line
        self.document = json.loads(text)
        self.port = urlsplit(self.document["url"]).port or 0

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path, headers={name.replace("_", "-"): each for name, each in headers.items()})
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def raw(self, *chunks: bytes) -> bytes:
        """Send bytes and return the answer up to its end, or up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S) as sock:
            with contextlib.suppress(ConnectionError):  # the server may close the connection before reading all data
                for chunk in chunks:
                    sock.sendall(chunk)
            found = b""
            with contextlib.suppress(ConnectionError):
                while b"\r\n\r\n" not in found and (more := sock.recv(65_536)):
                    found += more
            return found

    def end(self, with_signal: int) -> tuple[int, float]:
        """End the program with a signal. Return its exit code, and the seconds until it ended."""
        began = time.monotonic()
        self.program.send_signal(with_signal)
        return self.program.wait(LIMIT_S), time.monotonic() - began

    def resident_kb(self) -> int:
        (line,) = (
            each for each in Path(f"/proc/{self.program.pid}/status").read_text().splitlines() if "VmRSS" in each
        )
        return int(line.split()[1])


@pytest.fixture
def start(server: Server, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Start `agentperf serve` on a free port."""
    started: list[subprocess.Popen[str]] = []
    env = {**os.environ, "AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from agentperf_redis.cli import main; main()"

    def run(*words: str, **variables: str) -> Site:
        command = [sys.executable, "-W", "error", "-c", code, "serve", "--port", "0", "--json", *words]
        with (tmp_path / "stderr").open("a") as err:
            started.append(
                subprocess.Popen(command, env=env | variables, stdout=subprocess.PIPE, stderr=err, text=True)
            )
        return Site(started[-1])

    yield run
    for program in started:
        program.kill()
        program.communicate()


def open_live(site: Site, page: str = "/") -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Open a live page and return its connection after the first event."""
    connection = site.connect()
    connection.request("GET", f"/live?page={page}", headers={"Accept": "text/event-stream"})
    reply = connection.getresponse()
    assert (reply.status, reply.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
    text = b""
    while b"\r\n\r\n" not in text:
        text += reply.readline()
    assert text.startswith(b"event: main\r\n")
    assert b"<main" in text
    return connection, reply


@pytest.mark.thorough
def test_sigterm_ends_quickly_though_pages_are_open(
    perf: AgentPerf, start: Callable[..., Site], tmp_path: Path
) -> None:
    perf.metrics.record_execution("planner", 0.1, success=True)
    assert perf.metrics.flush()
    site = start("--every", "0.5")
    facts = {name: site.document[name] for name in ("kind", "namespace", "login", "actions")}
    assert facts == {"kind": "serve", "namespace": perf.backend.namespace, "login": False, "actions": False}
    assert site.document["url"] == f"http://127.0.0.1:{site.port}/", "by default, only this machine can reach it"
    status, page = site.get("/agents", Accept="text/html")
    assert (status, "planner" in page) == (200, True)
    opened = [open_live(site) for _ in range(5)]
    code, took = site.end(signal.SIGTERM)
    assert (code, took < 10) == (0, True), f"it took {took:.1f} s"
    for connection, reply in opened:
        with contextlib.closing(connection):
            reply.read()
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.thorough
def test_sigterm_right_after_the_start_is_not_lost(start: Callable[..., Site]) -> None:
    assert start().end(signal.SIGTERM)[0] == 0


@pytest.mark.thorough
def test_interrupt_ends_it_like_other_commands(start: Callable[..., Site]) -> None:
    site = start()
    opened = open_live(site)
    assert site.end(signal.SIGINT)[0] == 130
    opened[0].close()


@pytest.mark.thorough
def test_program_refuses_what_is_not_for_it(start: Callable[..., Site], tmp_path: Path) -> None:
    site = start("--allow-actions", AGENTPERF_TOKEN=TOKEN)
    assert (site.document["login"], site.document["actions"]) == (True, True)
    assert site.get("/")[0] == 401
    assert site.get("/metrics")[0] == 401
    assert site.get("/metrics", Authorization=f"Bearer {TOKEN}x")[0] == 401
    status, text = site.get("/metrics", Authorization=f"Bearer {TOKEN}")
    assert (status, "agentperf_up 1" in text) == (200, True)
    before = site.resident_kb()
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: "
    reply = site.raw(request, *[b"x" * 100_000] * 100, b"\r\n\r\n")
    assert reply == b"" or reply.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert site.resident_kb() - before < 5_000, "it did not keep the header"
    reply = site.raw(
        request.replace(b"X-Large", b"Authorization: Bearer " + TOKEN.encode() + b"\r\nX-Large")
        + b"x" * 40_000
        + b"\r\n\r\n"
    )
    assert reply.startswith(b"HTTP/1.1 431 ")
    for path in (
        b"/static/../settings.py",
        b"/static/%2e%2e/settings.py",
        b"/static/..%2f..%2fkeys.py",
        b"/../../etc/passwd",
    ):
        reply = site.raw(
            b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
        )
        assert reply.startswith(b"HTTP/1.1 404 "), path
    assert site.raw(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert site.get("/static/style.css")[0] == 200
    assert site.end(signal.SIGTERM)[0] == 0
    assert TOKEN not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--host", "0.0.0.0"), "other machines can reach --host 0.0.0.0, so give --token-file"),
        (("--host", "::"), "other machines can reach --host ::"),
        (("--token", "short"), "--token is 'a text of 5 characters'; allowed: a text of 16 to 512"),
        (("--token-file", "/nowhere/token"), "--token-file is '/nowhere/token'"),
        (("--allow-host", "http://x"), "--allow-host is 'http://x'; allowed: host names without a port"),
        (("--root-path", "x/"), "--root-path is 'x/'; allowed: a path"),
        (("--every", "0.1"), "--every"),
        (("--port", "65536"), "--port"),
    ],
)
def test_wrong_usage_exits_2(agentperf: Run, words: tuple[str, ...], message: str) -> None:
    done = agentperf("serve", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert message in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no address 127.0.0.2 by default")
@pytest.mark.parametrize("words", [(), ("--allow-host", "ops.example.com")])
def test_its_own_address_is_an_allowed_name(
    agentperf: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    made = []

    def run(app: Any, _listener: object, _root_path: str, announce: Callable[[], None], *_: object) -> None:
        made.append(app)
        announce()

    monkeypatch.setattr("agentperf_redis.web.server.run", run)
    done = agentperf("serve", "--host", "127.0.0.2", "--port", "0", "--json", *words)
    assert done.returncode == 0
    settings = made[0].state.settings
    assert settings.allows_host(urlsplit(json.loads(done.stdout)["url"]).netloc)
    assert settings.allows_host("ops.example.com") == bool(words)
    assert not settings.allows_host("other.example.com")


def test_port_in_use_exits_1(agentperf: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = agentperf("serve", "--port", str(port))
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "sse_starlette", "jinja2"])
def test_missing_package_names_the_extra(agentperf: Run, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    with monkeypatch.context() as patch:
        # `agentperf serve` imports the package `web` again and sets the attribute `agentperf_redis.web` to the new
        # module. At the end of the block, the patch restores the old module. If the attribute kept the new module,
        # later tests would patch a module that no code uses.
        patch.setattr(agentperf_redis, "web", getattr(agentperf_redis, "web", None), raising=False)
        for name in [each for each in sys.modules if each.startswith(("agentperf_redis.web", f"{package}."))]:
            patch.delitem(sys.modules, name)
        if package == "jinja2":  # `starlette.templating` imports jinja2
            patch.delitem(sys.modules, "starlette.templating", raising=False)
        patch.setitem(sys.modules, package, None)
        done = agentperf("serve")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert f'this needs the package {package}: pip install "agentperf-redis[web]"' in done.stderr


@pytest.mark.thorough
def test_proxy_may_show_it_under_a_path(start: Callable[..., Site]) -> None:
    site = start("--root-path", "/ops/dashboard")
    assert site.document["url"].endswith("/ops/dashboard/")
    for path in ("/agents", "/ops/dashboard/agents", "/static/style.css", "/ops/dashboard/static/style.css"):
        status, text = site.get(path)
        assert status == 200, path
        assert "static" in path or 'href="/ops/dashboard/static/style.css"' in text
    assert site.get("/ops/dashboardx/agents")[0] == 404
    connection, _ = open_live(site, "/agents")
    connection.close()


@pytest.mark.thorough
def test_page_appears_when_the_server_does(own_server: Server, start: Callable[..., Site]) -> None:
    own_server.kill()
    site = start("--every", "0.5", "--timeout", "0.3", AGENTPERF_REDIS_URL=own_server.url)
    status, page = site.get("/", Accept="text/html")
    assert (status, f"127.0.0.1:{own_server.port}" in page) == (503, True)
    own_server.restart()
    wait_until(lambda: site.get("/")[0] == 200, "the page")
