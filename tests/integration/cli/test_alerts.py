"""`agentperf alerts ...` and `agentperf check`: their output, their JSON and their exit codes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.backend import Backend
from tests.support.alert_rules import MINUTE, History, Receiver, evaluated
from tests.support.commandline import OK, UNREACHABLE, USAGE, Run, document, has_line, shown
from tests.support.programs import Programs
from tests.support.servers import wait_until

RULES = """
[[alert]]
name = "failing"
agents = "planner"
when = "failure_rate > 10%"
severity = "ticket"
notify = ["ops"]

[[alert]]
name = "queue"
pool = "coder"
when = "waiters > 2"

[notify.ops]
urls = ["json://user:hunter2@127.0.0.1:9/tok3n"]
command = ["/bin/false", "--key", "hunter2"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "rules.toml"
    made.write_text(RULES)
    return made


@pytest.fixture
def history(backend: Backend) -> History:
    history = History(backend)
    for at in history.minutes(30, 1):
        history.record("planner", at - 30, 0.5, failed=4 if (history.now - at) / MINUTE > 15 else 0, succeeded=6)
    history.count()
    return history


def test_commands_show_that_nothing_is_deployed(agentperf: Run) -> None:
    assert "agentperf alerts deploy FILE" in agentperf("alerts", "list").stderr
    assert "No alert has changed its state." in agentperf("alerts", "log").stderr
    assert document(agentperf("alerts", "list", "--json"), "alerts list")["alerts"] == []
    assert document(agentperf("alerts", "log", "--json"), "alerts log") == {
        "kind": "alerts log",
        "version": 1,
        "events": [],
    }
    done = agentperf("alerts", "silence", "x", "--for", "2h")
    assert (done.returncode, "none is deployed" in done.stderr) == (USAGE, True)


def test_deployed_rules_are_listed_and_silenced(agentperf: Run, perf: AgentPerf, history: History, file: Path) -> None:
    assert shown(agentperf("alerts", "deploy", str(file))) == "Deployed 2 rules as deployment 1.\n"
    evaluated(perf, history.minutes(20, 17))
    text = shown(agentperf("alerts", "list"))
    assert "2 rules, deployment 1; alerts: 1 firing" in text
    assert has_line(text, "firing", "failing", "planner", "ticket", "40.00%", "failure_rate > 10%")
    assert has_line(text, "queue", "pool coder", "waiters > 2", "never") or has_line(text, "queue", "pool coder")
    assert has_line(text, "ops/0", "json://…", "1", "0")
    assert has_line(text, "ops/command", "/bin/false …")
    assert shown(agentperf("alerts", "silence", "failing", "--for", "2h")).startswith("Silenced until 2")
    assert document(agentperf("alerts", "list", "--json"), "alerts list")["alerts"][0]["state"] == "silenced"
    assert shown(agentperf("alerts", "unsilence", "failing")) == "The silence has ended.\n"
    log = shown(agentperf("alerts", "log"))
    assert has_line(log, "failing", "planner", "ok", "firing", "failure_rate is 40.00%: failure_rate > 10%")
    assert has_line(log, "silenced", "ok", "silence ended by hand")
    events = document(agentperf("alerts", "log", "failing", "--json", "--limit", "3"), "alerts log")["events"]
    assert [event["after"] for event in events] == ["firing", "silenced", "ok"]
    for words in (("list",), ("log",), ("list", "--json"), ("log", "--json")):
        assert not re.search("hunter2|tok3n", shown(agentperf("alerts", *words)))


def test_faults_of_a_file_are_usage_errors(agentperf: Run, file: Path) -> None:
    file.write_text(RULES.replace("10%", "10s").replace("waiters", "wait"))
    for command in ("deploy", "test"):
        done = agentperf("alerts", command, str(file))
        assert (done.returncode, done.stdout) == (USAGE, "")
        assert (
            f"{file}, line 5, alert 'failing', when is 'failure_rate > 10s'; allowed: for failure_rate, a share"
            in done.stderr
        )
        assert "line 12, alert 'queue', when is" in done.stderr
        assert "2 faults; nothing was deployed" in done.stderr
    assert agentperf("alerts", "deploy", "/no/such/file").returncode == USAGE
    assert document(agentperf("alerts", "list", "--json"), "alerts list")["rules"] == []


def test_test_shows_what_would_have_fired(agentperf: Run, history: History, file: Path) -> None:
    done = agentperf("alerts", "test", str(file), "--since", "30m")
    assert done.returncode == OK
    assert has_line(done.stdout, "failing", "planner", "ticket", "0.4")
    plain = json.loads(agentperf("alerts", "test", str(file), "--since", "30m", "--json").stdout)
    assert (plain["kind"], plain["firings"][0]["rule"]) == ("alerts test", "failing")
    quiet = agentperf("alerts", "test", str(file), "--since", "5m", "--as-of", "2020-01-01T00:00")
    assert quiet.stdout.startswith("No rule would have fired from ")
    assert agentperf("alerts", "test", str(file), "--as-of", "then").returncode == USAGE


def test_run_once_evaluates_and_delivers(agentperf: Run, perf: AgentPerf, file: Path) -> None:
    perf.balancer().register_instance(AgentInstance("c1", "coder"))
    with Receiver() as receiver:
        text = RULES.replace("waiters > 2", "healthy > 0").replace('severity = "ticket"\n', "")
        text = text.replace('healthy > 0"', 'healthy > 0"\nnotify = ["ops"]').replace(
            "json://user:hunter2@127.0.0.1:9/tok3n", receiver.url
        )
        file.write_text(text)
        shown(agentperf("alerts", "deploy", str(file)))
        plain = json.loads(agentperf("alerts", "run", "--once", "--json").stdout)
        assert (plain["kind"], plain["notifications"]) == ("alerts run", 2)
        assert [event["rule"] for event in plain["events"]] == ["queue"]
        assert receiver.titles() == ["FIRING: queue, coder"]


@pytest.mark.thorough
def test_run_prints_transitions_until_it_is_ended(programs: Programs, perf: AgentPerf) -> None:
    perf.alerts.deploy(text='[[alert]]\nname = "up"\npool = "coder"\nwhen = "healthy > 0"')
    perf.balancer().register_instance(AgentInstance("c1", "coder"))
    programs.write("app.py", "from agentperf_redis.cli import main\nmain()\n")
    program = programs.start("app", "alerts", "run")
    wait_until(lambda: "firing    up, coder: healthy is 1: healthy > 0" in programs.log(), "the transition")
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 0
    assert "Traceback" not in programs.log()


CHECKS = [
    (("--agent", "planner", "--when", "failure_rate > 50%"), 0, "OK: planner: failure_rate is"),
    (("--agent", "planner", "--when", "failure_rate > 5%"), 2, "CRITICAL: planner: failure_rate is 25.00%"),
    (("--agent", "plan*", "--when", "failure_rate > 50%", "--warn", "failure_rate > 5%"), 1, "WARNING: planner"),
    (("--agent", "planner", "--when", "p95 > 1s", "--min-events", "1000"), 3, "UNKNOWN: planner: 240 executions"),
    (("--agent", "nobody", "--when", "p95 > 1s"), 3, "UNKNOWN: there is no agent 'nobody'"),
    (("--agent", "planner", "--when", "p95 > 1"), 3, "UNKNOWN: --when is 'p95 > 1'; allowed: for p95, a duration"),
    (("--agent", "planner", "--when", "p95 > 1s", "--warn", "p50 > 1s"), 3, "a condition on p95, as in --when"),
    (("--when", "p95 > 1s"), 3, "UNKNOWN: give one of --agent, --cache and --pool"),
    (("--agent", "a", "--pool", "b", "--when", "p95 > 1s"), 3, "UNKNOWN: give one of"),
    (("--agent", "planner", "--when", "p95 > 1s", "--window", "long"), 3, "UNKNOWN: window is 'long'"),
    (("--cache", "answers", "--when", "hit_rate < 80%"), 2, "CRITICAL: answers: hit_rate is 50.00%"),
    (("--cache", "empty", "--when", "hit_rate < 80%"), 3, "UNKNOWN: empty: no data"),
    (("--cache", "answers", "--when", "size > 5"), 0, "OK: answers: size is 1"),
    (("--pool", "coder", "--when", "healthy < 1"), 0, "OK: coder: healthy is 1"),
    (("--pool", "coder", "--when", "load > 90%"), 0, "OK: coder: load is 0.00%"),
]


def test_check_has_exit_codes_of_nagios(agentperf: Run, perf: AgentPerf, history: History) -> None:
    perf.balancer().register_instance(AgentInstance("c1", "coder"))
    cache = perf.cache("answers", max_size=5)
    cache.put("a", 1)
    cache.get("a")
    cache.get("b")
    cache.flush()
    perf.cache("empty", max_size=5).put("a", 1)
    for words, code, text in CHECKS:
        window = () if "--window" in words else ("--window", "1h")
        done = agentperf("check", *words, *window)
        assert (done.returncode, done.stderr) == (code, ""), (words, done)
        assert text in done.stdout, (words, done.stdout)
        assert done.stdout.count("\n") == 1
    done = agentperf("check", "--agent", "*", "--when", "failure_rate > 5%", "--window", "1h", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["kind"], found["status"]) == (2, "check", "CRITICAL")
    assert found["targets"][0]["target"] == "planner"
    assert found["targets"][0]["value"] == 0.25


def test_commands_without_a_server(agentperf: Run, file: Path) -> None:
    away = ("--url", "redis://127.0.0.1:1", "--timeout", "0.1")
    assert agentperf("check", "--agent", "a", "--when", "p95 > 1s", *away).returncode == 3
    for words in (("list",), ("log",), ("deploy", str(file)), ("silence", "x", "--for", "1h"), ("run", "--once")):
        assert agentperf("alerts", *words, *away).returncode == UNREACHABLE, words


def test_inspect_hides_the_addresses_of_receivers(agentperf: Run, file: Path, namespace: str) -> None:
    agentperf("alerts", "deploy", str(file))
    for more in ((), ("--json",)):
        text = shown(agentperf("inspect", f"{namespace}:{{alerts}}:rules", *more))
        assert "notify:ops" in text
        assert "failure_rate" in text
        assert not re.search("hunter2|tok3n", text)
