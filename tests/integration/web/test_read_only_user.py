"""A Redis user without any right to write suffices for the web page, which writes nothing.

The user has the rights that `agentperf doctor --acl --read-only` prints.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.cli import acl
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.web import app
from tests.support.every_command import fill, release
from tests.support.filled import Past
from tests.support.markup import parsed
from tests.support.servers import Raw, Server
from tests.support.web import Browser
from tests.support.workers import Workers

PAGES = (
    "/",
    "/agents",
    "/agent?name=planner",
    "/caches",
    "/cache?name=answers",
    "/cache?name=docs",
    "/pools",
    "/pool?name=coder",
    "/alerts",
    "/memory",
)


def hold(url: str, namespace: str) -> Iterator[None]:
    """Hold a lease for at least 0.2 s."""
    with AgentPerf(url, namespace=namespace) as perf:
        perf.balancer().register_instance(AgentInstance("busy", "tester", max_capacity=1))
        held = perf.balancer().acquire("tester", ttl=0.2)
        assert held is not None
        yield None


@pytest.fixture
def filled(server: Server, namespace: str, workers: Workers) -> None:
    """A namespace in which each service was used. A process died while it held a lease, and the lease has expired.

    An agent was busy for an hour and a half, so that the slices of its past minutes are closed.
    """
    with server.client() as raw:
        past = Past(raw, namespace)
        for age in range(5400, 0, -2):
            past.at(float(age)).record("planner", 0.01 * 1.3 ** (age % 31), OK)
        past.count()
    with AgentPerf(server.url, namespace=namespace) as perf:
        fill(perf)
        release(perf)
    worker = workers.start(hold, server.url, namespace)
    worker.said()
    worker.kill()
    time.sleep(0.25)


@pytest.fixture
def user(server: Server, namespace: str) -> Iterator[tuple[str, str]]:
    """A user with the rights to read; its name and its URL."""
    name = f"dashboard-{uuid.uuid4().hex[:8]}"
    rules = acl.rules(namespace, read_only=True, password=">secret")
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", name, *rules)
    yield name, server.url.replace("://", f"://{name}:secret@")
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "DELUSER", name)


def refused(server: Server, name: str) -> list[str]:
    """Return what the servers have refused to a user."""
    found = []
    for node in server.nodes:
        with node.client() as client:
            client.set_response_callback("ACL LOG", lambda reply, **_: reply)
            log = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in client.execute_command("ACL LOG")]
            found += [f"{entry['reason']} {entry['object']}" for entry in log if entry["username"] == name]
    return found


def stored(raw: Raw, namespace: str) -> dict[str, object]:
    """Return what each key holds."""
    read = {
        "hash": lambda key: sorted(raw.hgetall(key).items()),
        "zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
        "set": lambda key: sorted(raw.smembers(key)),
        "list": lambda key: raw.lrange(key, 0, -1),
        "stream": raw.xrange,
        "string": raw.get,
        "none": lambda key: None,
    }
    keys = (key for key in raw.keys(f"{namespace}:*") if "{workers}" not in key)
    return {key: read[raw.type(key)](key) for key in sorted(keys)}


@pytest.mark.thorough
def test_reading_user_sees_every_page_and_writes_nothing(
    filled: None, user: tuple[str, str], server: Server, namespace: str, runner: asyncio.Runner
) -> None:
    name, url = user
    reader = AgentPerf(url, namespace=namespace)
    browser = Browser(runner, app(reader))
    with server.client(encoding_errors="replace") as raw:
        for key in raw.keys(f"{namespace}:*"):
            raw.persist(key)  # keeps old slices from expiring during the test
        before = stored(raw, namespace)
        for path in PAGES:
            reply = browser.get(path)
            assert reply.status == 200, path
            assert "could not be read" not in reply.text, path
        assert parsed(browser.get("/pools").text).row("tester")[-1] == "1", "its overdue lease"
        scraped = browser.get("/metrics", accept="text/plain")
        assert (scraped.status, "agentperf_up 1" in scraped.text) == (200, True)
        runner.run(reader.aclose())
        after = stored(raw, namespace)
    assert {key for key in before | after if before.get(key) != after.get(key)} == set()
    assert refused(server, name) == []


@pytest.mark.thorough
@pytest.mark.standalone
def test_every_right_is_needed(
    filled: None, user: tuple[str, str], server: Server, namespace: str, runner: asyncio.Runner
) -> None:
    name, url = user
    needed = set()
    with server.client() as client:
        for right in acl.rights(read_only=True):
            client.execute_command("ACL", "SETUSER", name, f"-{right}")
            client.script_flush()
            client.execute_command("ACL", "LOG", "RESET")
            reader = AgentPerf(url, namespace=namespace, deadline=1.0)
            browser = Browser(runner, app(reader))
            for path in PAGES:
                browser.get(path)
            runner.run(reader.aclose())
            if refused(server, name):
                needed.add(right)
            client.execute_command("ACL", "SETUSER", name, f"+{right}")
    assert needed == set(acl.rights(read_only=True)) - set(acl.CONNECTING)


@pytest.mark.thorough
def test_memory_page_names_the_rights_that_are_missing(
    filled: None, user: tuple[str, str], server: Server, namespace: str, runner: asyncio.Runner
) -> None:
    name, url = user
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", name, *(f"-{right}" for right in acl.MEMORY))
    reader = AgentPerf(url, namespace=namespace)
    reply = Browser(runner, app(reader)).get("/memory")
    assert (reply.status, "NOPERM" in reply.text) == (200, True)
    runner.run(reader.aclose())


def test_empty_namespace_is_no_fault_for_a_reading_user(
    user: tuple[str, str], server: Server, namespace: str, runner: asyncio.Runner
) -> None:
    reader = AgentPerf(user[1], namespace=namespace)
    browser = Browser(runner, app(reader))
    for path in ("/", "/agents", "/caches", "/pools", "/alerts", "/memory"):
        assert browser.get(path).status == 200, path
    runner.run(reader.aclose())
    with server.client() as raw:
        assert raw.keys(f"{namespace}:*") == []
