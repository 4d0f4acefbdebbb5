"""Finds the namespaces in use on a server, for a user who gave a wrong namespace."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.errors import AgentPerfError, CorruptState
from agentperf_redis.transport.address import ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.executor import Executor
from agentperf_redis.transport.topology import Topology

_PAGE_KEYS = 1000
_MAX_PAGES = 100
_MAX_S = 1.0
"""A search reads at most this many pages of keys from each primary, and takes at most this long for all: about 100,000
keys of a primary. No index lists all namespaces, because a user's rights may end at its own namespace."""
_MAX_FOUND = 1000
_META = re.compile(r"([A-Za-z0-9_.-]{1,64}):meta")


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        names: the other namespaces in which something is stored, sorted.
        complete: whether the search has seen all keys.
    """

    names: list[str]
    complete: bool


def others(backend: Backend) -> Found | None:
    """Search for other namespaces; return None if the namespace of the backend is in use itself.

    Raises:
        AgentPerfError: the server is unreachable, or the user may not run SCAN.
    """
    if backend.run(_in_use(backend.namespace)):
        return None
    found: set[str] = set()
    end = time.monotonic() + _MAX_S
    complete = True
    for server in _primaries(backend):
        with contextlib.closing(server):
            cursor = b"0"
            for _ in range(_MAX_PAGES):
                cursor, page = server.run(_scan(cursor))
                found.update(match[1] for key in page if (match := _META.fullmatch(key)) is not None)
                if cursor == b"0" or time.monotonic() > end or len(found) > _MAX_FOUND:
                    break
            complete = complete and cursor == b"0"
    names = sorted(found - {backend.namespace})[:_MAX_FOUND]
    used = backend.run(_used(names))
    return Found([name for name, in_use in zip(names, used, strict=True) if in_use], complete)


def _primaries(backend: Backend) -> Iterator[Executor]:
    """Yield a driver for each server that holds keys."""
    address = backend.address
    for node in backend.primaries:
        at = address
        if address.kind in (ServerKind.CLUSTER, ServerKind.SENTINEL):
            at = replace(address, kind=ServerKind.STANDALONE, nodes=((node.host, node.port),))
        yield Executor(Connector(at), Topology(at), None, backend.deadline, None)


def _in_use(namespace: str) -> Command[bool]:
    """Ask whether anything is stored in a namespace.

    The first use of a pool, a cache or the metrics creates the list of resources. So this list shows whether anything
    is stored. The key `meta` does not show it, because even reading a namespace creates this key.
    """
    where = keys.resources(namespace)
    return Command("ZCARD", (where,), (), lambda reply: _count(where, reply) > 0)


def _used(names: list[str]) -> Flow[list[bool]]:
    answers = yield from Batch(tuple(_in_use(name) for name in names))
    return [answer is True for answer in answers]


def _scan(cursor: bytes) -> Command[tuple[bytes, list[str]]]:
    def decode(reply: Reply) -> tuple[bytes, list[str]]:
        match reply:
            case [bytes(after), list(found)]:
                return after, [key.decode(errors="replace") for key in found if isinstance(key, bytes)]
        raise AgentPerfError(f"SCAN had an unexpected reply {reply!r}")

    return Command("SCAN", (), (cursor.decode(), "MATCH", "*:meta", "COUNT", str(_PAGE_KEYS)), decode)


def _count(where: str, reply: Reply) -> int:
    if not isinstance(reply, int):
        raise CorruptState(where, f"an unexpected reply {reply!r}")
    return reply
