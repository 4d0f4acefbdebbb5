"""The shell command that shows the keys of a demo with redis-cli."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from agentperf_redis.transport.address import Address
from agentperf_redis.transport.topology import Node

_FILES = {"ssl_ca_certs": "--cacert", "ssl_certfile": "--cert", "ssl_keyfile": "--key"}
"""Name of a TLS option of the URL -> option of redis-cli."""


def scan_command(address: Address, nodes: Sequence[Node], socket: Path | None, namespace: str) -> str:
    """Return the command. It runs redis-cli once for each primary.

    redis-cli accepts neither the URL of a Sentinel or Cluster nor several nodes at once.

    Args:
        address: the server. Instead of its password, the command contains ``***``.
        nodes: the primaries.
        socket: the Unix socket of the embedded server, if the server is embedded.
        namespace: prefix of the keys.
    """
    scan = f"--scan --pattern {shlex.quote(f'{namespace}:*')}"
    path = str(socket) if socket is not None else address.path
    if path:
        database = f" -n {address.db}" if address.db else ""
        user = f" --user {shlex.quote(address.username)}" if address.username else ""
        secret = " --askpass" if address.password else ""
        return f"redis-cli -s {shlex.quote(path)}{user}{secret}{database} {scan}"
    servers = [shlex.quote(_url(address, node)) for node in nodes]
    given = [(flag, address.option(name)) for name, flag in _FILES.items()]
    files = "".join(f" {flag} {shlex.quote(value)}" for flag, value in given if value)
    if len(servers) == 1:
        return f"redis-cli -u {servers[0]}{files} {scan}"
    return f'for server in {" ".join(servers)}; do redis-cli -u "$server"{files} {scan}; done'


def _url(address: Address, node: Node) -> str:
    user = quote(address.username or "", safe="")
    login = f"{user}:***@" if address.password else f"{user}@" if user else ""
    host = f"[{node.host}]" if ":" in node.host else node.host
    return f"{'rediss' if address.tls else 'redis'}://{login}{host}:{node.port}/{address.db}"
