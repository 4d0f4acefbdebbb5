"""Tests of the whole command line: usage, exit codes, help, and a namespace of a newer version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import pytest

from tests.support.commandline import FAILURE, OK, UNREACHABLE, USAGE, Program, Run
from tests.support.servers import Server


@pytest.mark.standalone
@pytest.mark.parametrize("tail", ["0", "99"])
def test_refused_connection_does_not_suggest_a_server(agentperf: Run, server: Server, tail: str) -> None:
    login = "me:hunter2@" if tail == "0" else ""
    done = agentperf("status", "--url", f"redis://{login}127.0.0.1:{server.port}/{tail}")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")
    assert ("WRONGPASS" if login else "DB index is out of range") in done.stderr
    assert "agentperf up" not in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("status", "--url", "nonsense"), "--url is 'nonsense'; allowed: a URL"),
        (("status", "--namespace", "a b"), "--namespace is 'a b'; allowed: 1 to 64"),
        (("status", "--timeout", "nan"), "--timeout is nan; allowed: seconds from 0.01"),
        (("status", "--timeout", "soon"), "--timeout"),
        (("agents", "--window", "0s"), "--window is '0s'; allowed: one second"),
        (("agents", "--window", "foo"), "--window is 'foo'; allowed: seconds, or a text such as"),
        (("compare", "planner"), "agentperf: give OTHER, or --window to compare with the time before it\n"),
        (("status", "--nonsense"), "--nonsense"),
        (("nonsense",), "nonsense"),
        (("demo", "--workers", "0"), "--workers"),
    ],
)
def test_wrong_usage_exits_2(agentperf: Run, words: tuple[str, ...], message: str) -> None:
    done = agentperf(*words)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert message in done.stderr


def test_newer_namespace_is_left_unchanged(agentperf: Run, server: Server, namespace: str) -> None:
    with server.client() as client:
        client.hset(f"{namespace}:meta", mapping={"schema": 7, "epoch": "e"})
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert done.returncode == FAILURE
    assert "version 7" in done.stderr


def test_help_lists_commands_and_version_prints(program: Program, agentperf: Run) -> None:
    help_ = program("--help")
    assert help_.returncode == OK
    commands = "demo up down status agents show errors slow rank compare spans doctor lb cache export exporter version"
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
