"""`agentperf status`: all three services on one page."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from rich.color import ColorSystem

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.cli import console
from tests.support.commandline import OK, Run, Watching, document, has_line, shown
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until


def used(perf: AgentPerf) -> AgentInstance | None:
    """Use each service, and return an instance that holds a lease."""
    perf.metrics.record_execution("planner", 0.25, success=True)
    perf.metrics.record_execution("planner", 0.75, success=False, error_type="TimeoutError")
    cache = perf.cache("answers", max_size=7)
    cache.put("why?", "because")
    cache.get("why?")
    lb = perf.balancer()
    lb.register_instance(AgentInstance(id="p1", agent_type="planner", max_capacity=5))
    perf.metrics.flush()
    cache.flush()
    return lb.acquire("planner")


def test_status_shows_all_three_services(agentperf: Run, server: Server, perf: AgentPerf, namespace: str) -> None:
    held = used(perf)
    assert held is not None
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert "2 tasks of 1 agent in" in shown(done)
    for words in (("planner", "2", "50.0%", "TimeoutError × 1"), ("answers", "1", "7"), ("p1", "up", "1/5")):
        assert has_line(done.stdout, *words), done.stdout
    found = document(agentperf("status", "--json"), "status")
    assert found["agents"][0]["errors"] == {"TimeoutError": 1}
    assert found["caches"][0]["max_entries"] == 7
    assert found["pools"]["planner"]["current_load"] == 1
    assert perf.balancer().release(held)


def test_status_reports_an_empty_namespace(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert done.returncode == OK
    assert "Nothing here yet" in done.stdout


def test_names_with_brackets_are_printed_unchanged(
    agentperf: Run, server: Server, perf: AgentPerf, namespace: str
) -> None:
    odd = ("[/x]", "[red]", ":boom:")
    for name in odd:
        perf.metrics.record_execution(name, 0.1, success=False, error_type=name)
        perf.cache(name).put("a", 1)
        perf.balancer().register_instance(AgentInstance(id=name, agent_type=name))
    perf.metrics.flush()
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert (done.returncode, done.stderr) == (OK, "")
    for name in odd:
        assert done.stdout.count(name) == 7, done.stdout


def test_problems_come_first(agentperf: Run, perf: AgentPerf) -> None:
    for number in range(40):
        perf.metrics.record_execution("steady", 0.1, True)
        perf.metrics.record_execution("flaky", 0.1, number > 1, "KeyError")
    perf.metrics.record_execution("broken", 0.1, False, "ValueError")
    perf.balancer().register_instance(AgentInstance(id="p1", agent_type="planner"))
    perf.balancer().mark_unhealthy("planner", "p1")
    perf.metrics.flush()
    lines = shown(agentperf("status", "--window", "5m")).splitlines()
    start = lines.index("problems")
    assert lines[start + 1 : start + 4] == [
        "bad   agent broken: 1 of 1 execution failed (100.0%), 1 with ValueError",
        "bad   pool planner: no instance takes work",
        "note  agent flaky: 2 of 40 executions failed (5.0%), 2 with KeyError",
    ]
    table = lines[lines.index("agents") + 2 :]
    assert [line.split()[0] for line in table[:3]] == ["broken", "flaky", "steady"]
    found = document(agentperf("status", "--json", "--window", "5m"), "status")
    assert [each["name"] for each in found["problems"]] == ["broken", "planner", "flaky"]
    assert found["summary"]["throughput_per_s"] == pytest.approx(81 / 300, rel=0.2)


def test_idle_agents_are_listed_with_their_age(agentperf: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    for width in ("10s", "1m", "1h", "1d"):
        raw.delete(*raw.keys(f"{namespace}:*:{width}:*"))  # as if the time slices had expired
    text = shown(agentperf("status", "--window", "5m"))
    assert re.search(r"^Idle in the last 5m: planner \((now|\d+ s ago)\)$", text, re.MULTILINE)
    found = document(agentperf("status", "--window", "5m", "--json"), "status")
    assert (found["agents"], [each["agent"] for each in found["idle"]]) == ([], ["planner"])


def test_past_status_leaves_out_caches_and_pools(agentperf: Run, perf: AgentPerf) -> None:
    assert perf.balancer().release(used(perf))
    text = shown(agentperf("status", "--window", "1h", "--as-of", f"{time.time() + 60:.0f}"))
    assert "Caches and pools keep no history here" in text
    assert not has_line(text, "answers")
    assert has_line(text, "planner", "TimeoutError × 1")


def test_failures_are_coloured_on_a_terminal(agentperf: Run, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    perf.metrics.record_execution("broken", 0.1, False)
    perf.metrics.flush()
    monkeypatch.setattr(console.out, "_force_terminal", True)
    monkeypatch.setattr(console.out, "_color_system", ColorSystem.STANDARD)
    text = agentperf("status").stdout
    assert any(line.startswith("\x1b[31m") and "broken" in line for line in text.splitlines())


@pytest.mark.thorough
def test_watch_prints_readings_until_interrupted(
    program_line: Callable[..., AbstractContextManager[Watching]], server: Server, perf: AgentPerf
) -> None:
    namespace = perf.backend.namespace
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    with program_line(
        "status", "--url", server.url, "--namespace", namespace, "--watch", "--every", "0.1", "--json"
    ) as watching:
        for _ in range(2):
            found = json.loads(watching.line())
            assert (found["kind"], found["agents"][0]["agent"]) == ("status", "planner")
        watching.process.send_signal(signal.SIGINT)
        assert watching.end() == (130, "")


@pytest.mark.thorough
def test_watch_ends_quietly_when_its_reader_goes(
    program_line: Callable[..., AbstractContextManager[Watching]], server: Server, perf: AgentPerf
) -> None:
    with program_line(
        "status", "--url", server.url, "--namespace", perf.backend.namespace, "--watch", "--every", "0.1"
    ) as watching:
        assert watching.line()
        watching.close_output()
        assert watching.end() == (console.Exit.CLOSED_PIPE, "")


@pytest.mark.thorough
def test_watch_redraws_a_terminal(server: Server, perf: AgentPerf) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    words = ("status", "--url", server.url, "--namespace", perf.backend.namespace, "--watch", "--every", "0.1")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        os.execv(sys.executable, [sys.executable, "-c", "from agentperf_redis.cli import main; main()", *words])
    try:
        seen = b""
        while seen.count(b"ends with Ctrl-C") < 3:
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 65_536)
        assert b"planner" in seen
        os.kill(pid, signal.SIGINT)
        with contextlib.suppress(OSError):  # on Linux, a read at the end of a terminal raises an error
            while os.read(terminal, 65_536):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(terminal)


@pytest.mark.thorough
def test_watch_survives_an_outage(
    program_line: Callable[..., AbstractContextManager[Watching]], own_server: Server, namespace: str
) -> None:
    words = ("status", "--namespace", namespace, "--watch", "--every", "0.1", "--json", "--timeout", "0.3")
    with program_line(*words, "--url", own_server.url) as watching:
        watching.line()
        own_server.kill()
        wait_until(lambda: "trying again" in watching.errors(), "the report of the outage")
        own_server.restart()
        watching.forget_lines()
        watching.line()
        watching.process.send_signal(signal.SIGINT)
        assert watching.end()[0] == 130
        assert watching.errors().count("trying again") == 1
