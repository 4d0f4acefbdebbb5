"""Tests of the whole command line: usage, exit codes, help, and a namespace of a newer version."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import pytest

from tests.support.commandline import FAILURE, OK, UNREACHABLE, USAGE, Program, Run, document
from tests.support.places import ROOT
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
    commands = "demo up down status agents show errors slow rank compare spans doctor inspect version"
    commands += " lb cache export exporter workers running series"
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
    for words in (("version", "--json"), ("--version", "--json"), ("--json", "--version"), ("--json", "version")):
        assert document(agentperf(*words), "version")["agentperf_redis"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--json",), "Missing command"),
        (("--url", "redis://x", "up"), "`agentperf up` takes no --url"),
        (("--namespace", "x", "version"), "takes no --namespace"),
    ],
)
def test_misplaced_options_exit_2(agentperf: Run, words: tuple[str, ...], message: str) -> None:
    done = agentperf(*words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert message in done.stderr


def test_option_after_the_command_wins(agentperf: Run, server: Server, namespace: str) -> None:
    other = f"{namespace}-2"
    done = agentperf("--url", "redis://127.0.0.1:1", "--namespace", other, "status", "--url", server.url, "--json")
    assert document(done, "status")["namespace"] == other


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "found"), [("agentperf ", "status"), ("agentperf lb ", "leases")])
def test_shell_completion_offers_commands(program: Program, words: str, found: str) -> None:
    done = program(_AGENTPERF_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split())))
    assert (done.returncode, done.stderr) == (OK, "")
    assert found in done.stdout.split()


@pytest.mark.thorough
def test_warnings_name_no_place_in_the_code() -> None:
    code = (
        "import warnings; from agentperf_redis import cli; from agentperf_redis.cli import app\n"
        "app.app = lambda **_: warnings.warn('late', RuntimeWarning, stacklevel=1)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "agentperf: warning: late\n"


@pytest.mark.privileged
def test_missing_and_needless_passwords_are_named(agentperf: Run, own_server: Server) -> None:
    needless = agentperf("status", "--url", own_server.url.replace("://", "://:hunter2@"))
    assert (needless.returncode, needless.stdout) == (UNREACHABLE, "")
    assert "it has no password, but the URL has one" in needless.stderr
    with own_server.client() as client:
        client.config_set("requirepass", "hunter2")
    missing = agentperf("status", "--url", own_server.url)
    assert (missing.returncode, missing.stdout) == (UNREACHABLE, "")
    assert "it needs a password: put it into the URL" in missing.stderr
    wrong = agentperf("status", "--url", own_server.url.replace("://", "://:hunter3@"))
    assert (wrong.returncode, wrong.stdout) == (UNREACHABLE, "")
    assert "user name or password are wrong" in wrong.stderr
    assert "hunter" not in needless.stderr + missing.stderr + wrong.stderr
    assert agentperf("status", "--url", own_server.url.replace("://", "://:hunter2@")).returncode == OK
