"""Tests of the findings of `agentperf doctor` on a server and on each node of a Cluster."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import redis

from agentperf_redis.cli import acl, console
from tests.support.commandline import FAILURE, OK, UNREACHABLE, USAGE, Run
from tests.support.schemas import SCHEMAS
from tests.support.servers import Server, free_port

pytestmark = pytest.mark.privileged  # most findings of the doctor need the command INFO


def test_doctor_examines_the_server(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    levels = {finding["subject"]: finding["level"] for finding in document["findings"]}
    assert (done.returncode, document["healthy"]) == (OK, True)
    assert set(levels) == {"commands", "version", "scripts", "eviction", "memory", "persistence", "role", "latency"}
    assert (levels["scripts"], levels["eviction"]) == ("ok", "ok")
    assert levels["version"] in ("ok", "note"), "the system's Redis 7.0 has a known fault"
    assert {each["subject"]: each["found"] for each in document["findings"]}["scripts"] == "can be run"


def test_doctor_reports_an_evicting_policy_as_bad(
    agentperf: Run, start_server: Callable[..., Server], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    server = start_server("valkey", "--maxmemory-policy", "allkeys-lru")
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace)
    assert done.returncode == FAILURE
    (line,) = (line for line in done.stdout.splitlines() if "allkeys-lru" in line)
    assert line.startswith("bad")
    assert "CONFIG SET maxmemory-policy noeviction" in line


@pytest.mark.thorough
def test_doctor_examines_every_primary_of_a_cluster(
    agentperf: Run, start_server: Callable[..., Server], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", 200)
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
    shown = agentperf("doctor", "--url", url, "--namespace", namespace)
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("bad"))
    assert nodes[1] in line


def test_doctor_reports_a_namespace_it_cannot_open(agentperf: Run, server: Server, namespace: str) -> None:
    with server.client() as client:
        client.hset(f"{namespace}:meta", mapping={"schema": 7, "epoch": "e"})
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, "--json")
    assert done.returncode == FAILURE
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["scripts"]["level"] == "bad"
    assert "version 7" in found["scripts"]["found"]
    assert found["version"]["level"] in ("ok", "note")
    assert "over 100 round trips" in found["latency"]["found"]  # the level of this finding depends on the machine


def test_doctor_works_without_the_info_right(
    agentperf: Run, start_server: Callable[..., Server], namespace: str
) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command("ACL SETUSER me on >pw ~* &* +@all -info")
    url = f"redis://me:pw@127.0.0.1:{server.port}"
    done = agentperf("doctor", "--url", url, "--namespace", namespace, "--json")
    assert done.returncode == OK
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert set(found) == {"commands", "facts", "scripts", "latency"}
    assert found["facts"]["level"] == "note"
    assert "NOPERM" in found["facts"]["found"]


@pytest.mark.parametrize("command", ["EVALSHA", "SPUBLISH", "SSUBSCRIBE", "HSET"])
def test_doctor_reports_a_renamed_command(
    agentperf: Run, start_server: Callable[..., Server], namespace: str, command: str
) -> None:
    server = start_server("valkey", "--rename-command", command, "HIDDEN")
    done = agentperf("doctor", "--url", server.url, "--namespace", namespace, "--json")
    assert done.returncode == FAILURE
    (bad,) = (finding for finding in json.loads(done.stdout)["findings"] if finding["subject"] == "commands")
    assert bad["level"] == "bad"
    assert bad["found"].startswith(f"{command}: ERR ")
    assert "unknown" in bad["found"].lower()
    assert "rename-command" in bad["advice"]


@pytest.mark.parametrize("right", ["eval", "evalsha"])
def test_doctor_shows_the_words_of_the_server(
    agentperf: Run, start_server: Callable[..., Server], namespace: str, right: str
) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command(f"ACL SETUSER me on >pw ~* &* +@all -{right}")
    done = agentperf("doctor", "--url", f"redis://me:pw@127.0.0.1:{server.port}", "--namespace", namespace, "--json")
    assert done.returncode == FAILURE
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    for subject in ("commands", "scripts"):
        assert found[subject]["level"] == "bad"
        assert f"'{right}'" in found[subject]["found"]
        assert "NOPERM" in found[subject]["found"]
    assert found["commands"]["advice"].startswith(f"grant +{right};")


def test_doctor_leaves_no_keys(agentperf: Run, start_server: Callable[..., Server], namespace: str) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command("ACL SETUSER me on >pw ~* &* +@all -unlink -pexpireat")
        url = f"redis://me:pw@127.0.0.1:{server.port}"
        assert agentperf("doctor", "--url", url, "--namespace", namespace).returncode == FAILURE
        (scratch,) = client.scan_iter("*{doctor:*")
        assert 0 < client.pttl(scratch) <= 10_000
        assert agentperf("doctor", "--url", server.url, "--namespace", namespace).returncode == OK
        assert list(client.scan_iter("*{doctor:*")) == [scratch]


def test_doctor_reports_a_server_that_is_down(agentperf: Run, start_server: Callable[..., Server]) -> None:
    server = start_server("valkey")
    server.kill()
    for url in (server.url, f"redis+cluster://127.0.0.1:{server.port}"):
        done = agentperf("doctor", "--url", url, "--timeout", "1")
        assert done.returncode == UNREACHABLE
        assert f"127.0.0.1:{server.port}" in done.stderr


@pytest.mark.parametrize("read_only", [False, True])
def test_printed_acl_command_makes_a_user_once_it_has_a_password(
    agentperf: Run, server: Server, namespace: str, read_only: bool
) -> None:
    done = agentperf("doctor", "--acl", "--user", namespace, *(("--read-only",) if read_only else ()))
    assert done.returncode == OK
    (line,) = done.stdout.splitlines()
    assert "Not compared" not in done.stderr
    assert "lacks" not in done.stderr
    with server.nodes[0].client() as client:
        with pytest.raises(redis.ResponseError, match=acl.PLACEHOLDER):
            client.execute_command(*shlex.split(line))
        assert namespace not in client.acl_users()
        assert client.execute_command(*shlex.split(line.replace(acl.PLACEHOLDER, ">secret"))) in (True, "OK")
        assert client.execute_command(*shlex.split(line.replace(acl.PLACEHOLDER, ">other"))) in (True, "OK")
        rules = client.acl_getuser(namespace)
        assert len(rules["passwords"]) == 1, "the command replaces what the user had"
        client.acl_deluser(namespace)


def test_acl_command_as_json_is_complete(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("doctor", "--acl", "--json")
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMAS["acl"])
    assert (found["user"], found["namespace"], found["compared"]) == ("worker", namespace, True)
    assert shlex.split(found["command"]) == ["ACL", "SETUSER", "worker", *found["rules"]]
    assert found["password_rule"] in found["rules"]


def test_acl_command_needs_no_server(agentperf: Run, namespace: str) -> None:
    done = agentperf("doctor", "--acl", "--url", f"redis://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout.startswith("ACL SETUSER worker ")) == (OK, True)
    assert "Not compared with the commands of a server: nothing listens on" in done.stderr


def test_acl_command_names_rights_that_the_server_lacks(
    agentperf: Run, start_server: Callable[..., Server], namespace: str
) -> None:
    server = start_server("valkey", "--rename-command", "SPUBLISH", "HIDDEN")
    done = agentperf("doctor", "--acl", "--url", server.url)
    assert done.returncode == OK
    assert "This server lacks spublish" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--acl", "--user", "a b"), "--user is 'a b'; allowed: 1 to 64 characters"),
        (("--user", "me"), "--read-only and --user go with --acl"),
        (("--read-only",), "--read-only and --user go with --acl"),
        (("--acl", "--namespace", "a*"), "--namespace is 'a*'"),
        (("--acl", "--url", "nonsense"), "--url"),
    ],
)
def test_options_of_acl_are_checked(agentperf: Run, words: tuple[str, ...], says: str) -> None:
    done = agentperf("doctor", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert says in done.stderr
