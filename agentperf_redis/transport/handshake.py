"""What is said first on a connection: is the server new enough, whose namespace is it, does it still have its data?

It travels on the connection itself, before anything else: no command reaches a server or a namespace that was not
looked at, whichever thread or task made the connection. A further connection to a node that this process is connected
to already needs no greeting, since a server that was restarted in between would have broken the others. In a Cluster
the namespace's own key lies on one node, which drivers ask before their first command.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from agentperf_redis import keys
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError, CorruptState, SchemaMismatch
from agentperf_redis.script import Script
from agentperf_redis.transport.resp import ServerError, pack, pack_call

SCHEMA = 1
"""Major version of the data model; a namespace with a higher one is not touched."""
OLDEST = {"redis": (7, 0), "valkey": (7, 2)}
"""Oldest servers that have what the scripts use (SPUBLISH, writes that free memory on a full server)."""
REPLIES = 2

_OPEN = Script("namespace/open")


class Handshake:
    """Says the first words, and judges the answers.

    Args:
        address: the server, for people.
        namespace: prefix of all keys.
        on_epoch: called with the namespace's epoch, once an answer had it.
    """

    def __init__(self, address: str, namespace: str, on_epoch: Callable[[str], None]) -> None:
        self._address = address
        self._namespace = namespace
        self._meta = keys.meta(namespace)
        self._on_epoch = on_epoch

    def opening(self) -> Command[None]:
        """Return the command that founds or checks the namespace, on the node that has it."""
        return Command(_OPEN, (self._meta,), {"schema": SCHEMA, "epoch": secrets.token_hex(8)}, self._opened)

    def request(self) -> bytes:
        """Return what to send; `REPLIES` replies come back. The script is sent whole: the server may not know it."""
        return pack(("HELLO",)) + pack_call(self.opening(), by_source=True, again=False)

    def parse(self, replies: Sequence[Reply]) -> AgentPerfError | None:
        """Take the answers. Returns why this server must not be used, or None.

        An error reply that says nothing about that is passed over: the key lies on another node of the Cluster, the
        server is loading or full, the user may not ask. What is then sent meets the same error, and tells its caller.
        """
        hello, opened = replies
        if not isinstance(hello, ServerError):
            too_old = self._too_old(hello)
            if too_old is not None:
                return too_old
        if isinstance(opened, ServerError):
            if opened.text.startswith(("WRONGTYPE", "CORRUPT")):
                return CorruptState(self._meta, "something that is no namespace of this library")
            return None
        try:
            self._opened(opened)
        except AgentPerfError as error:
            return error
        return None

    def _opened(self, reply: Reply) -> None:
        try:
            _, schema, epoch = reply
            number, text = int(schema), epoch.decode()
        except (AttributeError, TypeError, ValueError):
            raise CorruptState(self._meta, f"an unexpected reply {reply!r}") from None
        if number > SCHEMA:
            raise SchemaMismatch(f"namespace {self._namespace}", str(number), f"schema {SCHEMA} or lower")
        self._on_epoch(text)

    def _too_old(self, hello: Reply) -> AgentPerfError | None:
        try:
            facts = dict(zip(hello[::2], hello[1::2], strict=True))
            server = facts[b"server"].decode()
            version = tuple(int(part) for part in facts[b"version"].decode().split(".")[:3])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None  # something that speaks for a server, such as a proxy; the scripts will show
        if version >= OLDEST.get(server, OLDEST["redis"]):
            return None
        needed = " or ".join(f"{name.capitalize()} {dotted(oldest)}" for name, oldest in OLDEST.items())
        return SchemaMismatch(f"{server} at {self._address}", dotted(version), f"{needed}, or newer")


def dotted(version: tuple[int, ...]) -> str:
    """Return ``7.0`` for (7, 0)."""
    return ".".join(map(str, version))
