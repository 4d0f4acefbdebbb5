"""A primary, its replica and three Sentinels, for the tests of a failover."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentperf_redis.embedded import start_bound
from tests.support.servers import Node, free_port, program, wait_until

SERVICE = "main"
_AT_FIRST = {"down-after-milliseconds": 600_000, "failover-timeout": 600_000}
"""Settings until the test lets the Sentinels act. Sooner, they might replace a primary that a busy machine delays, and
would lead the replica round the `Link`."""
_FOR_FAILOVER = {"down-after-milliseconds": 500, "failover-timeout": 2000}


class Link:
    """The connection of a replica to its primary. It can stop, as in a slow network, and then lose what it has.

    Attributes:
        port: the port on 127.0.0.1 to which the replica connects.
    """

    def __init__(self, primary_port: int) -> None:
        self._primary_port = primary_port
        self.port = free_port()
        self._open, self._ended = threading.Event(), threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = [socket.create_server(("127.0.0.1", self.port))]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def hold(self) -> None:
        """From now on, the replica receives nothing. The primary notices nothing."""
        self._open.clear()

    def close(self) -> None:
        """End the connection. What `hold` has kept back is lost."""
        self._ended.set()
        self._open.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _start(self, function: object, *args: socket.socket) -> None:
        thread = threading.Thread(target=function, args=args, name="replication link", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        listener = self._sockets[0]
        while not self._ended.is_set():
            with suppress(OSError):
                replica, _ = listener.accept()
                self._sockets.append(replica)
                primary = socket.create_connection(("127.0.0.1", self._primary_port))
                self._sockets.append(primary)
                self._start(self._copy, replica, primary)
                self._start(self._copy, primary, replica)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                self._open.wait()
                if self._ended.is_set():
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Group:
    """Servers that Sentinels monitor as `SERVICE`.

    Attributes:
        primary: the server that is primary at the start.
        replica: its replica.
        link: the connection between the two.
        ports: ports of the three Sentinels.
    """

    primary: Node
    replica: Node
    link: Link
    ports: tuple[int, ...]

    @property
    def url(self) -> str:
        """The URL for the library."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.ports)}/{SERVICE}"

    def replicated(self) -> float:
        """Wait until the replica has all that was written before this call; return the time of the call."""
        begun = time.monotonic()
        with self.primary.client() as primary, self.replica.client() as replica:
            offset = primary.info("replication")["master_repl_offset"]
            wait_until(lambda: replica.info("replication")["slave_repl_offset"] >= offset, "the replica")
        return begun

    def role(self) -> str:
        """Return the role of the replica now: "slave" or "master", or "" while it closes connections to change it."""
        with self.replica.client() as client:
            try:
                return str(client.info("replication")["role"])
            except redis.ConnectionError:
                return ""

    def allow_failover(self) -> None:
        """Let the Sentinels replace the primary once it is down for half a second. Before, they do nothing."""
        settings = [word for setting in _FOR_FAILOVER.items() for word in setting]
        for port in self.ports:
            with _client(port) as client:
                client.execute_command("SENTINEL", "SET", SERVICE, *settings)


def _client(port: int) -> redis.Redis:
    return redis.Redis(port=port, decode_responses=True, retry=Retry(NoBackoff(), 0))


def _start_sentinel(folder: Path, primary_port: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start a Sentinel. It stores its state in its configuration file."""
    port, server = free_port(), program("valkey")
    assert server is not None
    config = folder / f"sentinel-{port}.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor {SERVICE} 127.0.0.1 {primary_port} 2\n"
        + "".join(f"sentinel {name} {SERVICE} {value}\n" for name, value in _AT_FIRST.items())
    )
    return start_bound([server, config, "--sentinel"], folder / f"sentinel-{port}.log"), port


def _knows_all(port: int) -> bool:
    """Return whether a Sentinel knows two other Sentinels and one replica."""
    with _client(port) as client:
        try:
            facts = client.sentinel_master(SERVICE)
        except redis.RedisError:
            return False
        return int(facts["num-other-sentinels"]) == 2 and int(facts["num-slaves"]) == 1


@contextmanager
def sentinel_group(folder: Path) -> Iterator[Group]:
    """Start a primary, its replica and three Sentinels, which are ready when the block begins."""
    with ExitStack() as stack:
        primary = Node("valkey", "--repl-diskless-sync-delay", "0")
        stack.callback(primary.stop)
        link = Link(primary.port)
        stack.callback(link.close)
        replica = Node("valkey", "--replicaof", f"127.0.0.1 {link.port}")
        stack.callback(replica.stop)
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", "replication")
        ports = []
        for _ in range(3):
            process, port = _start_sentinel(folder, primary.port)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ports.append(port)
        for port in ports:
            wait_until(partial(_knows_all, port), "the Sentinels to know each other")
        yield Group(primary, replica, link, tuple(ports))
