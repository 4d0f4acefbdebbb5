"""Cluster behaviour: slots move while they are in use, and nodes die."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command
from agentperf_redis.errors import BackendUnavailable, ScriptFailed
from agentperf_redis.keys import SLOTS, key_slot
from agentperf_redis.script import Script
from agentperf_redis.script_header import parse_header
from agentperf_redis.transport import connector, executor
from tests.support.driving import Run, add
from tests.support.servers import Node, Server, migrate_login, wait_until

pytestmark = pytest.mark.thorough

TIMEOUT = 30.0


def node_ids(server: Server) -> dict[Node, str]:
    ids = {}
    for node in server.nodes:
        with node.client() as client:
            ids[node] = client.execute_command("CLUSTER", "MYID")
    return ids


def test_moving_slot_in_use_loses_no_write(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str
) -> None:
    server = start_server("cluster")
    backend = connect(server.url)
    slot = key_slot(f"{namespace}:counter")
    source = server.nodes[slot * len(server.nodes) // SLOTS]
    target = next(node for node in server.nodes if node is not source)
    ids = node_ids(server)
    stop, acknowledged, errors = threading.Event(), [0] * 4, list[Exception]()

    def load(number: int) -> None:
        try:
            while not stop.is_set():
                backend.run(add(namespace))
                acknowledged[number] += 1
        except Exception as error:  # noqa: BLE001  the test reports it
            errors.append(error)

    def call(node: Node, *words: str | int) -> None:
        with node.client() as client:
            client.execute_command(*words)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(acknowledged) > 20, "the load", TIMEOUT)
    call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    before = sum(acknowledged)
    wait_until(lambda: sum(acknowledged) > before + 20, "commands while the slot is open", TIMEOUT)
    call(source, "MIGRATE", "127.0.0.1", target.port, f"{namespace}:counter", 0, 5000, *migrate_login())
    before = sum(acknowledged)
    wait_until(lambda: sum(acknowledged) > before + 20, "commands that are redirected once (ASK)", TIMEOUT)
    for node in (target, source, *(node for node in server.nodes if node not in (source, target))):
        call(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    before = sum(acknowledged)
    wait_until(lambda: sum(acknowledged) > before + 20, "commands at the new node (MOVED)", TIMEOUT)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    with target.client() as client:
        assert int(client.get(f"{namespace}:counter") or 0) == sum(acknowledged)


@pytest.mark.privileged
@pytest.mark.servers("cluster")
def test_script_outside_its_slot_is_refused(
    server: Server, run: Run, connect: Callable[..., Backend], namespace: str
) -> None:
    """In tests on a Cluster, every script has a shebang, so the server refuses a script that uses another slot."""

    class StrayScript(Script):
        source = """#!lua
-- KEYS
--   one  STRING  any
redis.call('SET', KEYS[1], 1)
return redis.call('SET', 'elsewhere', 1)
"""
        header = parse_header(source.removeprefix("#!lua\n"))

    # If the slot of `elsewhere` is on another node, the script fails with an error that also occurs during the move of
    # a slot. So the client retries until its deadline.
    backend = connect(server.url, deadline=2.0)
    with pytest.raises((ScriptFailed, BackendUnavailable), match=r"do not hash to the same slot|non local"):
        run(backend, Command(StrayScript("test/stray"), (f"{namespace}:x",), (), lambda reply: reply))
    assert Script("namespace/open").source.startswith("#!lua\n")


@pytest.mark.servers("cluster")
def test_dead_seed_is_skipped(server: Server, connect: Callable[..., Backend], run: Run, namespace: str) -> None:
    backend = connect(server.url.replace("redis+cluster://", "redis+cluster://127.0.0.1:1,"))
    assert run(backend, add(namespace)) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("endpoint", ["hostname", "unknown-endpoint"])
def test_nodes_without_a_host_name_are_reached(
    start_server: Callable[..., Server], connect: Callable[..., Backend], run: Run, namespace: str, endpoint: str
) -> None:
    """In the layout of the Cluster and in redirects, the nodes announce ``?`` or no host."""
    server = start_server("cluster", "--cluster-preferred-endpoint-type", endpoint)
    backend = connect(server.url)
    names = [f"counter-{number}" for number in range(30)]
    assert [run(backend, add(namespace, name=name)) for name in names] == [1] * 30
    slot = key_slot(f"{namespace}:{names[0]}")
    source = server.nodes[slot * len(server.nodes) // SLOTS]
    target = next(node for node in server.nodes if node is not source)
    ids = node_ids(server)
    with source.client() as old, target.client() as new:
        new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        old.execute_command("MIGRATE", "127.0.0.1", target.port, f"{namespace}:{names[0]}", 0, 5000, *migrate_login())
        read = Command("GET", (f"{namespace}:{names[0]}",), (), lambda reply: reply)
        assert run(backend, read) == b"1"  # redirected once (ASK)
        for client in (new, old):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    assert run(backend, add(namespace, name=names[0])) == 2  # redirected (MOVED)


@pytest.mark.servers("cluster")
def test_batch_is_sent_to_all_nodes_before_any_reply_is_read(
    backend: Backend, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{namespace}:{number}" for number in range(60)]
    batch = Batch(tuple(Command("EXISTS", (key,), (), lambda reply: reply) for key in keys))
    assert backend.run(batch) == [0] * 60
    done: list[str] = []

    def noting(word: str, function: Any) -> Any:
        def note(*args: Any) -> Any:
            done.append(word)
            return function(*args)

        return note

    monkeypatch.setattr(executor, "send", noting("send", connector.send))
    monkeypatch.setattr(executor, "read", noting("read", connector.read))
    assert backend.run(batch) == [0] * 60
    assert done == ["send"] * 3 + ["read"] * 60


@pytest.mark.servers("cluster")
def test_batch_reaches_the_nodes_that_answer(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str
) -> None:
    server = start_server("cluster", "--cluster-require-full-coverage", "no")
    backend = connect(server.url)
    keys = [f"{namespace}:{number}" for number in range(60)]
    batch = Batch(tuple(Command("EXISTS", (key,), (), lambda reply: reply) for key in keys))
    assert backend.run(batch) == [0] * 60
    lost = server.nodes[0]
    lost.kill()
    found = backend.run(batch.settled(), 1.0)
    for key, result in zip(keys, found, strict=True):
        node = backend.node_of(key)
        assert node is not None
        assert isinstance(result, BackendUnavailable) if node.port == lost.port else result == 0
