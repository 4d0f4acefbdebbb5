"""The handshake of a new connection: it checks the server version, the namespace schema and the epoch.

A new epoch shows that the server came back without its data. The handshake is the first request on the connection, so
no command reaches an unchecked server or namespace, whichever thread or task opened the connection. While a driver has
a connection to a node, a further connection to the node needs no handshake: a restart of the server would have broken
the first connection. In a Cluster, the key of the namespace lies on one node. Before the first command of a driver, the
driver checks the namespace on that node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from agentperf_redis import keys
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError, CorruptState, SchemaMismatch
from agentperf_redis.script import Script
from agentperf_redis.transport.resp import ServerError, pack, pack_call

SCHEMA = 1
"""Major version of the data model. A namespace with a higher version is refused and left unchanged."""
OLDEST = {"redis": (7, 0), "valkey": (7, 2)}
"""Oldest supported servers. The scripts need SPUBLISH, and need to free memory on a server at its maxmemory.

Servers with other names number their versions in their own way, so their versions are not checked.
"""
REPLIES = 2

_OPEN = Script("namespace/open")


class Handshake:
    """Builds the handshake request and checks the replies.

    Args:
        address: the server, for error messages.
        namespace: prefix of all keys.
        on_epoch: called with the epoch of the namespace from each reply.
    """

    def __init__(self, address: str, namespace: str, on_epoch: Callable[[str], None]) -> None:
        self._address = address
        self._namespace = namespace
        self._meta = keys.meta(namespace)
        self._on_epoch = on_epoch

    def opening(self) -> Command[None]:
        """Return the command that creates the namespace or checks it, on the node that has its key."""
        return Command(_OPEN, (self._meta,), {"schema": SCHEMA, "epoch": os.urandom(8).hex()}, self._check_opened)

    def request(self) -> bytes:
        """Return the handshake request. It has `REPLIES` replies.

        The request includes the source of the script, because a new server does not know the script yet.
        """
        return pack(("HELLO",)) + pack_call(self.opening(), by_source=True, again=False)

    def parse(self, replies: Sequence[Reply]) -> AgentPerfError | None:
        """Check the replies. Return the reason why this server must not be used, or None.

        An error reply is ignored if the key lies on another node of the Cluster, if the server is loading or full, or
        if the user lacks a permission. The commands that follow on the connection get the same error and raise it in
        their callers.
        """
        hello, opened = replies
        if not isinstance(hello, ServerError):
            mismatch = self._check_version(hello)
            if mismatch is not None:
                return mismatch
        if isinstance(opened, ServerError):
            if opened.text.startswith(("WRONGTYPE", "CORRUPT")):
                return CorruptState(self._meta, "something that is not a namespace of this library")
            return None
        try:
            self._check_opened(opened)
        except AgentPerfError as error:
            return error
        return None

    def _check_opened(self, reply: Reply) -> None:
        try:
            _, schema, epoch = reply
            number, text = int(schema), epoch.decode()
        except (AttributeError, TypeError, ValueError):
            raise CorruptState(self._meta, f"an unexpected reply {reply!r}") from None
        if number > SCHEMA:
            raise SchemaMismatch(f"namespace {self._namespace}", str(number), f"schema {SCHEMA} or lower")
        if text:  # the epoch is empty if a user without write permission opens an empty namespace
            self._on_epoch(text)

    def _check_version(self, hello: Reply) -> AgentPerfError | None:
        try:
            facts = dict(zip(hello[::2], hello[1::2], strict=True))
            server = facts[b"server"].decode()
            version = tuple(int(part) for part in facts[b"version"].decode().split(".")[:3])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None  # perhaps a proxy answered; if its server is unsuitable, the scripts will fail
        if server not in OLDEST or version >= OLDEST[server]:
            return None  # a server not in OLDEST is not checked: if it is unsuitable, the scripts will fail
        needed = " or ".join(f"{name.capitalize()} {dotted(oldest)}" for name, oldest in OLDEST.items())
        return SchemaMismatch(f"{server} at {self._address}", dotted(version), f"{needed}, or newer")


def dotted(version: tuple[int, ...]) -> str:
    """Return ``7.0`` for (7, 0)."""
    return ".".join(map(str, version))
