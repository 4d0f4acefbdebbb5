"""If the namespace of a command is empty, the command lists the namespaces in use on the server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.backend import Backend
from agentperf_redis.cli import namespaces
from agentperf_redis.views import scanning
from tests.support.commandline import NOT_FOUND, OK, Run
from tests.support.servers import Server

pytestmark = pytest.mark.privileged  # a search of the whole server needs the rights of an operator


@pytest.fixture
def two(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with the namespaces "staging" and "prod", leftovers of the namespace "wrong", and two foreign keys."""
    for name in ("staging", "prod"):
        with AgentPerf(own_server.url, namespace=name) as perf:
            perf.metrics.record_execution("planner", 0.1, True)
    with AgentPerf(own_server.url, namespace="wrong") as perf:
        assert not perf.metrics.snapshots()
    with own_server.client() as client:
        client.set("another:program:meta", "x")
        client.set("its:meta", "x")
    monkeypatch.setenv("AGENTPERF_REDIS_URL", own_server.url)
    return own_server


HINT = "is empty. In use on this server: prod, staging; --namespace chooses one.\n"


def test_wrong_namespace_names_those_in_use(agentperf: Run, two: Server) -> None:
    for words, code in (
        (("status",), OK),
        (("agents",), OK),
        (("rank",), OK),
        (("slow",), OK),
        (("errors",), OK),
        (("lb", "status"), OK),
        (("cache", "list"), OK),
        (("show", "planner"), NOT_FOUND),
        (("lb", "leases", "planner"), NOT_FOUND),
        (("cache", "stats", "answers"), NOT_FOUND),
    ):
        done = agentperf(*words, "--namespace", "prd", "--url", two.url)
        assert done.returncode == code
        assert done.stderr.endswith("Namespace prd " + HINT), done.stderr
        assert "Namespace" not in agentperf(*words, "--namespace", "prod", "--url", two.url).stderr


def test_search_ends_at_its_bound(
    two: Server, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with two.client() as client:
        client.mset({f"other:{number}": "x" for number in range(3000)})
    backend = connect(two.url)
    assert namespaces.others(backend) == namespaces.Found(["prod", "staging"], complete=True)
    monkeypatch.setattr(scanning, "MAX_PAGES", 1)
    found = namespaces.others(backend)
    assert found is not None
    assert not found.complete


def test_user_without_scan_gets_no_hint(agentperf: Run, two: Server) -> None:
    with two.client() as client:
        client.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~prd:*", "&prd:*", "+@all", "-scan")
    url = two.url.replace("://", "://me:secret@")
    done = agentperf("agents", "--namespace", "prd", "--url", url)
    assert (done.returncode, done.stderr) == (OK, "Nothing was recorded.\n")


@pytest.mark.thorough
@pytest.mark.servers("cluster")
def test_namespaces_of_a_cluster_are_found(agentperf: Run, perf: AgentPerf) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    done = agentperf("agents", "--namespace", "prd")
    assert "In use on this server" in done.stderr  # the server also has namespaces of other tests
