"""Tests of the command `agentperf exporter`, as a program of its own and in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.cli import console
from agentperf_redis.cli.exporter import Faults
from agentperf_redis.errors import CorruptState
from agentperf_redis.export.reading import Reading
from tests.support import exposition
from tests.support.commandline import FAILURE, USAGE, Run
from tests.support.exposition import Exposed
from tests.support.places import ROOT
from tests.support.servers import Server, wait_until

LIMIT_S = 60.0
"""Seconds that a program may take to end. A loaded machine needs many times the usual time."""


class Exporter:
    """A running exporter.

    Attributes:
        program: its process.
        url: the URL of its page.
    """

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self.program = program
        assert program.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = program.stdout.readline()
            assert line, "the exporter has ended"
            text += line
        self.document = json.loads(text)
        self.url = self.document["url"]

    def scrape(self) -> Exposed:
        with urllib.request.urlopen(self.url, timeout=LIMIT_S) as reply:
            return exposition.plain(reply.read().decode())

    def end(self, with_signal: int) -> int:
        self.program.send_signal(with_signal)
        return self.program.wait(LIMIT_S)


@pytest.fixture
def start(server: Server, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Exporter]]:
    """Start `agentperf exporter` on a free port."""
    started: list[subprocess.Popen[str]] = []
    env = {**os.environ, "AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    # If a shell runs the tests as a background job, child processes ignore SIGINT. So the program sets a handler.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from agentperf_redis.cli import main; main()"

    def run(*words: str) -> Exporter:
        command = [sys.executable, "-c", code, "exporter", "--port", "0", "--json", *words]
        with (tmp_path / "stderr").open("a") as err:
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True))
        return Exporter(started[-1])

    yield run
    for program in started:
        program.kill()
        program.communicate()


@pytest.mark.thorough
def test_restart_moves_no_counter_backwards(perf: AgentPerf, start: Callable[..., Exporter]) -> None:
    for number in range(50):
        perf.metrics.record_execution(f"agent-{number % 3}", 0.1 * number, number % 5 != 0, "TimeoutError")
    perf.cache("answers").put("a", 1)
    assert perf.metrics.flush()
    first = start()
    assert first.document["kind"] == "exporter"
    assert first.document["namespace"] == perf.backend.namespace
    assert first.url.startswith("http://127.0.0.1:"), "by default, only this machine can reach it"
    before = first.scrape()
    assert first.end(signal.SIGTERM) == 0
    perf.metrics.record_execution("agent-0", 0.25, success=True)
    assert perf.metrics.flush()
    second = start()
    after = second.scrape()
    counters = [name for name, kind in before.kinds.items() if kind in ("counter", "histogram")]
    compared = 0
    for (name, labels), value in before.values.items():
        if any(name.startswith(counter) for counter in counters):
            assert after.values[name, labels] >= value, name
            compared += 1
    assert compared > 80
    more = after.value("agentperf_agent_executions_total", agent="agent-0", outcome="success")
    assert more == before.value("agentperf_agent_executions_total", agent="agent-0", outcome="success") + 1
    assert second.end(signal.SIGINT) == 130


def test_port_in_use_exits_1(agentperf: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = agentperf("exporter", "--port", str(port))
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "-1"), "--port"),
        (("--port", "65536"), "--port"),
        (("--otlp", "http://localhost:1", "--every", "soon"), "--every is 'soon'; allowed: seconds"),
        (("--otlp", "http://localhost:1", "--every", "2h"), "--every is '2h'; allowed: one second to one hour"),
    ],
)
def test_wrong_usage_exits_2(agentperf: Run, words: tuple[str, ...], message: str) -> None:
    done = agentperf("exporter", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert message in done.stderr


@contextmanager
def missing(package: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make imports of a package fail as if the package were not installed. Modules that import it fail too."""
    with monkeypatch.context() as patch:
        for name in [each for each in sys.modules if each.startswith(("agentperf_redis.export.", f"{package}."))]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, package, None)
        yield


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (("exporter", "--port", "0"), "prometheus_client", "prometheus"),
        (("exporter", "--otlp", "http://localhost:4318"), "opentelemetry", "otel"),
        (("export", "grafana"), "grafana_foundation_sdk", "grafana"),
    ],
)
def test_missing_package_names_the_extra(
    agentperf: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], package: str, extra: str
) -> None:
    with missing(package, monkeypatch):
        done = agentperf(*words)
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert f"needs the package {package}" in done.stderr
    assert f'pip install "agentperf-redis[{extra}]"' in done.stderr


def test_faults_are_reported_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console.err, "width", 140)
    faults = Faults()
    well = Reading("n", "1", took={"agents": 0.1, "pools": 0.1})
    bad = Reading("n", "1", took={"agents": 0.1}, errors={"agents": CorruptState("a key", "text")})
    for each in (well, bad, bad, well, well):
        faults.note(each)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("agentperf: agents are not exported: a key holds text")
    assert second == "agentperf: agents are exported again"


@pytest.mark.thorough
@pytest.mark.standalone
def test_exporter_survives_an_outage(own_server: Server, namespace: str, start: Callable[..., Exporter]) -> None:
    with AgentPerf(own_server.url, namespace=namespace) as perf:
        perf.metrics.record_execution("planner", 1.0, success=True)
    exporter = start("--url", own_server.url, "--timeout", "0.5")
    assert exporter.scrape().value("agentperf_up") == 1
    own_server.pause()
    try:
        wait_until(lambda: exporter.scrape().value("agentperf_up") == 0, "the outage to be seen", timeout=30)
    finally:
        own_server.resume()
    wait_until(lambda: exporter.scrape().value("agentperf_up") == 1, "the server to be reached again", timeout=30)
    assert exporter.scrape().value("agentperf_agent_executions_total", agent="planner", outcome="success") == 1
    assert exporter.end(signal.SIGTERM) == 0
