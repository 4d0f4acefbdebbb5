"""The command line, as a user runs it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from tests.support.places import ROOT
from tests.support.servers import Server

OK, FAILURE, USAGE, UNREACHABLE = 0, 1, 2, 3

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def agentperf(tmp_path: Path) -> Run:
    """Run `agentperf` with a data folder of the test's own and no server in the environment."""
    env = {name: value for name, value in os.environ.items() if name not in ("AGENTPERF_REDIS_URL", "REDIS_URL")}
    env |= {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data"), "NO_COLOR": "1", "COLUMNS": "140"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", "from agentperf_redis.cli import main; main()"]
        return subprocess.run(
            [*command, *words], env=env | more, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def used(perf: AgentPerf) -> AgentInstance | None:
    """Leave something of each service behind. Returns what holds a lease."""
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
    assert (done.returncode, done.stderr) == (OK, "")
    assert "2 tasks of 1 agent in" in done.stdout
    for words in (("planner", "2", "50.0%", "TimeoutError × 1"), ("answers", "1", "7"), ("p1", "up", "1/5")):
        assert any(all(word in line for word in words) for line in done.stdout.splitlines()), done.stdout
    document = json.loads(
        agentperf("status", "--json", "--namespace", namespace, AGENTPERF_REDIS_URL=server.url).stdout
    )
    assert (document["kind"], document["version"]) == ("status", 1)
    assert document["agents"][0]["errors"] == {"TimeoutError": 1}
    assert document["caches"][0]["max_entries"] == 7
    assert document["pools"]["planner"]["current_load"] == 1
    assert perf.balancer().release(held)


def test_status_of_nothing_says_so(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert done.returncode == OK
    assert "Nothing here yet" in done.stdout


def test_doctor_examines_the_server(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    levels = {finding["subject"]: finding["level"] for finding in document["findings"]}
    assert (done.returncode, document["healthy"]) == (OK, True)
    assert set(levels) == {"version", "scripts", "eviction", "memory", "persistence", "role", "latency"}
    assert (levels["version"], levels["scripts"], levels["eviction"]) == ("ok", "ok", "ok")


def test_names_with_brackets_are_shown_as_they_are(
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
        assert done.stdout.count(name) == 5, done.stdout


def test_doctor_warns_of_a_policy_that_throws_leases_away(
    agentperf: Run, start_server: Callable[..., Server], namespace: str
) -> None:
    server = start_server("valkey", "--maxmemory-policy", "allkeys-lru")
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, COLUMNS="200")
    assert done.returncode == FAILURE
    (line,) = (line for line in done.stdout.splitlines() if "allkeys-lru" in line)
    assert line.startswith("bad")
    assert "CONFIG SET maxmemory-policy noeviction" in line


def test_doctor_examines_every_primary_of_a_cluster(
    agentperf: Run, start_server: Callable[..., Server], namespace: str
) -> None:
    own_server = start_server("cluster")
    with own_server.nodes[1].client() as client:
        client.config_set("maxmemory-policy", "allkeys-random")
    url = f"redis+cluster://127.0.0.1:{own_server.port}"
    done = agentperf("doctor", "--url", url, "--namespace", namespace, "--json")
    assert done.returncode == FAILURE
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    nodes = [f"127.0.0.1:{node.port}" for node in own_server.nodes]
    assert {finding["node"] for finding in findings if finding["subject"] == "eviction"} == set(nodes)
    (bad,) = (finding for finding in findings if finding["level"] == "bad")
    assert (bad["node"], bad["subject"], bad["found"]) == (nodes[1], "eviction", "allkeys-random")
    shown = agentperf("doctor", "--url", url, "--namespace", namespace, COLUMNS="200")
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("bad"))
    assert nodes[1] in line


def test_doctor_finds_that_a_namespace_cannot_be_opened(agentperf: Run, server: Server, namespace: str) -> None:
    with server.client() as client:
        client.hset(f"{namespace}:meta", mapping={"schema": 7, "epoch": "e"})
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, "--json")
    assert done.returncode == FAILURE
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["scripts"]["level"] == "bad"
    assert "version 7" in found["scripts"]["found"]
    assert found["version"]["level"] == "ok"
    assert "over 100 round trips" in found["latency"]["found"]  # how slow they were is the machine's affair


def test_doctor_helps_a_user_who_may_not_ask_for_facts(
    agentperf: Run, start_server: Callable[..., Server], namespace: str
) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command("ACL SETUSER me on >pw ~* &* +@all -info")
    url = f"redis://me:pw@127.0.0.1:{server.port}"
    done = agentperf("doctor", "--url", url, "--namespace", namespace, "--json")
    assert done.returncode == OK
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert set(found) == {"facts", "scripts", "latency"}
    assert found["facts"]["level"] == "note"
    assert "NOPERM" in found["facts"]["found"]


def test_up_status_and_down_find_one_another(agentperf: Run) -> None:
    try:
        up = agentperf("up", "--json")
        assert up.returncode == OK, up.stderr
        first = json.loads(up.stdout)
        assert first["was_running"] is False
        assert Path(first["url"].removeprefix("unix://")).stat().st_mode & 0o077 == 0
        again = json.loads(agentperf("up", "--json").stdout)
        assert (again["pid"], again["was_running"]) == (first["pid"], True)
        status = agentperf("status")
        assert status.returncode == OK
        assert first["url"] in status.stdout
        said = agentperf("up")
        assert said.stdout == first["url"] + "\n"
        assert f"redis-cli -s {first['url'].removeprefix('unix://')}" in said.stderr
        assert f"export AGENTPERF_REDIS_URL={first['url']}" in said.stderr
        by_scheme = agentperf("status", AGENTPERF_REDIS_URL="embedded://")
        assert (by_scheme.returncode, by_scheme.stderr) == (OK, "")
    finally:
        down = agentperf("down", "--json")
    assert json.loads(down.stdout)["stopped"] is True
    assert json.loads(agentperf("down", "--json").stdout)["stopped"] is False


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_looking_starts_no_server(agentperf: Run, tmp_path: Path, command: str) -> None:
    for url, up in (
        ("embedded://", "`agentperf up`"),
        (f"embedded://{tmp_path}/a", f"`agentperf up --data {tmp_path}/a`"),
    ):
        done = agentperf(command, AGENTPERF_REDIS_URL=url)
        folder = ("--data", str(tmp_path / "a")) if url.endswith("a") else ()
        assert json.loads(agentperf("down", "--json", *folder).stdout)["stopped"] is False
        assert (done.returncode, done.stdout) == (UNREACHABLE, "")
        assert f"{url}: " in done.stderr
        assert up in done.stderr


@pytest.mark.standalone
@pytest.mark.parametrize("tail", ["0", "99"])
def test_a_refusal_is_no_reason_to_start_a_server(agentperf: Run, server: Server, tail: str) -> None:
    login = "me:hunter2@" if tail == "0" else ""
    done = agentperf("status", "--url", f"redis://{login}127.0.0.1:{server.port}/{tail}")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")
    assert ("WRONGPASS" if login else "DB index is out of range") in done.stderr
    assert "agentperf up" not in done.stderr
    assert "hunter2" not in done.stderr


def test_no_server_is_exit_3_and_says_what_to_do(agentperf: Run) -> None:
    done = agentperf("status", "--url", "redis://me:hunter2@127.0.0.1:1/0", "--timeout", "0.2")
    assert done.returncode == UNREACHABLE
    assert done.stdout == ""
    assert "agentperf up" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("status", "--url", "nonsense"), "--url is 'nonsense'; allowed: a URL"),
        (("status", "--namespace", "a b"), "--namespace is 'a b'; allowed: 1 to 64"),
        (("status", "--timeout", "nan"), "--timeout is nan; allowed: seconds from 0.01"),
        (("status", "--timeout", "soon"), "--timeout"),
        (("agents", "--window", "0s"), "--window is '0s'; allowed: one second"),
        (("compare", "planner"), "OTHER is None; allowed: an agent to compare with; None only with a window"),
        (("status", "--nonsense"), "--nonsense"),
        (("nonsense",), "nonsense"),
        (("demo", "--workers", "0"), "--workers"),
    ],
)
def test_wrong_usage_is_exit_2(agentperf: Run, words: tuple[str, ...], told: str) -> None:
    done = agentperf(*words)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert told in done.stderr


def test_a_namespace_of_a_newer_version_is_left_alone(agentperf: Run, server: Server, namespace: str) -> None:
    with server.client() as client:
        client.hset(f"{namespace}:meta", mapping={"schema": 7, "epoch": "e"})
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert done.returncode == FAILURE
    assert "version 7" in done.stderr


def test_help_and_version(agentperf: Run) -> None:
    help_ = agentperf("--help")
    assert help_.returncode == OK
    commands = "demo up down status agents show errors slow rank compare spans doctor lb cache version"
    for command in commands.split():
        assert command in help_.stdout
    assert "3 server unreachable, 4 not found" in " ".join(help_.stdout.split())
    (by_command, by_option) = agentperf("version"), agentperf("--version")
    try:
        expected = installed("agentperf-redis")
    except PackageNotFoundError:
        expected = "not installed"
    assert by_command.stdout == by_option.stdout == expected + "\n"
    assert by_command.returncode == by_option.returncode == OK
