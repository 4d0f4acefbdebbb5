"""`agentperf top` without a terminal prints a line for each reading. tests/integration/top tests its screen."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.cli import top
from tests.support.commandline import FAILURE, OK, USAGE, Run, Watching, document, shown
from tests.support.servers import Server


@pytest.mark.thorough
def test_lines_are_printed_until_interrupted(
    program_line: Callable[..., AbstractContextManager[Watching]], server: Server, perf: AgentPerf
) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    words = ("top", "--url", server.url, "--namespace", perf.backend.namespace, "--every", "0.5")
    with program_line(*words) as watching:
        assert watching.line().split() == [
            "time",
            "tasks",
            "per",
            "s",
            "failed",
            "p95",
            "s",
            "cost",
            "workers",
            "hits",
            "load",
            "queue",
            "firing",
        ]
        for _ in range(2):
            assert watching.line().split()[1:5:2] == ["1", "0.0%"]
        watching.process.send_signal(signal.SIGINT)
        assert watching.end() == (130, "")


def test_count_ends_the_lines(agentperf: Run, perf: AgentPerf) -> None:
    perf.metrics.record_execution("planner", 0.1, False)
    perf.metrics.flush()
    lines = shown(agentperf("top", "--count", "2", "--every", "0.5", "--window", "1h")).splitlines()
    assert len(lines) == 3
    assert [line.split()[3] for line in lines[1:]] == ["100.0%", "100.0%"]
    found = document(agentperf("top", "--json", "--count", "1"), "top")
    assert (found["tasks"], found["failures"], found["window"]) == (1, 1, "10m")
    assert document(agentperf("top", "--json", "--count", "1", "--window", "300"), "top")["window"] == "5m"


@pytest.mark.thorough
def test_outage_is_reported_once_and_ends_nothing(
    program_line: Callable[..., AbstractContextManager[Watching]], start_server: Callable[..., Server], namespace: str
) -> None:
    server = start_server(aof=True)
    words = ("top", "--url", server.url, "--namespace", namespace, "--every", "0.5", "--timeout", "0.5", "--json")
    with program_line(*words) as watching:
        assert json.loads(watching.line())["kind"] == "top"
        server.kill()
        while "trying again" not in watching.errors():
            pass
        watching.forget_lines()
        server.restart()
        assert json.loads(watching.line())["tasks"] == 0
        watching.process.send_signal(signal.SIGINT)
        code, errors = watching.end()
        assert (code, errors.count("trying again")) == (130, 1)


def test_wrong_window_is_refused_before_anything_else(agentperf: Run) -> None:
    done = agentperf("top", "--window", "soon", "--url", "redis://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "--window is 'soon'" in done.stderr


def test_missing_package_names_the_extra(agentperf: Run, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_is_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "textual", None)
    for name in [name for name in sys.modules if name.startswith("agentperf_redis.top.app")]:
        monkeypatch.delitem(sys.modules, name)
    done = agentperf("top")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert 'needs the package textual: pip install "agentperf-redis[top]"' in done.stderr
    assert agentperf("top", "--count", "1").returncode == OK
