"""A failover under Sentinel: after a bounded outage, the client finds the new primary."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.embedded import start_bound
from tests.support.driving import Run, add
from tests.support.servers import Node, free_port, program, wait_until

TIMEOUT = 30.0


def start_sentinel(folder: Path, primary_port: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start a Sentinel. It stores its state in its configuration file."""
    port, server = free_port(), program("valkey")
    assert server is not None
    config = folder / f"sentinel-{port}.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor main 127.0.0.1 {primary_port} 2\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
    )
    return start_bound([server, config, "--sentinel"], folder / f"sentinel-{port}.log"), port


def known_peers(port: int) -> tuple[int, int]:
    """Return how many other Sentinels and how many replicas a Sentinel knows."""
    with redis.Redis(port=port, decode_responses=True, retry=Retry(NoBackoff(), 0)) as client:
        try:
            facts = client.sentinel_master("main")
        except redis.RedisError:
            return -1, -1
        return int(facts["num-other-sentinels"]), int(facts["num-slaves"])


def _knows_all(port: int) -> bool:
    return known_peers(port) == (2, 1)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[tuple[Node, Node, list[int]]]:
    """A primary, its replica, and the ports of three Sentinels that monitor them as "main"."""
    with contextlib.ExitStack() as stack:
        primary = Node("valkey", "--repl-diskless-sync-delay", "0")
        stack.callback(primary.stop)
        replica = Node("valkey", "--replicaof", f"127.0.0.1 {primary.port}")
        stack.callback(replica.stop)
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", "replication", TIMEOUT)
        ports = []
        for _ in range(3):
            process, port = start_sentinel(tmp_path, primary.port)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ports.append(port)
        for port in ports:
            wait_until(partial(_knows_all, port), "the Sentinels to know each other", TIMEOUT)
        yield primary, replica, ports


@pytest.mark.thorough
@pytest.mark.privileged
@pytest.mark.servers("valkey")
def test_client_follows_a_sentinel_failover(
    group: tuple[Node, Node, list[int]], connect: Callable[..., Backend], run: Run, namespace: str, server_kind: str
) -> None:
    primary, replica, ports = group
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    backend = connect(f"redis+sentinel://{hosts}/main", deadline=TIMEOUT)
    assert run(backend, add(namespace)) == 1
    with replica.client() as client:
        wait_until(lambda: client.get(f"{namespace}:counter") == "1", "the write on the replica", TIMEOUT)
    primary.kill()
    assert run(backend, add(namespace)) >= 2
    port = run(backend, Command("CONFIG", (), ("GET", "port"), lambda reply: int(reply[1])))
    assert port == replica.port
