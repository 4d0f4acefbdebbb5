"""Reads the names of all keys of a namespace, server by server. The user needs the right ``+scan``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.address import ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.executor import Executor
from agentperf_redis.transport.topology import Topology

PAGE_KEYS = 1000
MAX_PAGES = 100
MAX_S = 1.0
"""A scan reads at most this many pages from each primary: about 100,000 keys. It takes at most about this many seconds
for all primaries together."""


def primaries(backend: Backend) -> Iterator[Executor]:
    """Yield a driver for each server that holds keys. The generator closes each driver afterwards."""
    address = backend.address
    for node in backend.primaries:
        at = address
        if address.kind in (ServerKind.CLUSTER, ServerKind.SENTINEL):
            at = replace(address, kind=ServerKind.STANDALONE, nodes=((node.host, node.port),))
        with contextlib.closing(Executor(Connector(at), Topology(at), None, backend.deadline, None)) as server:
            yield server


class Scan:
    """Reads the names of keys page by page, at most `MAX_PAGES` pages per server and `MAX_S` seconds in all.

    Args:
        backend: the server and namespace.
        pattern: glob of the keys.

    Attributes:
        complete: whether the scan has seen all keys; valid once the scan has ended.
    """

    def __init__(self, backend: Backend, pattern: str) -> None:
        self._backend = backend
        self._pattern = pattern
        self._end = time.monotonic() + MAX_S
        self.complete = True

    def pages(self) -> Iterator[tuple[Executor, list[str]]]:
        """Yield each page of keys with the driver of their server. A scan may yield a key twice.

        Raises:
            AgentPerfError: the server is unreachable, or the user may not run SCAN.
        """
        for server in primaries(self._backend):
            cursor = b"0"
            for _ in range(MAX_PAGES):
                cursor, page = server.run(_scan(cursor, self._pattern))
                yield server, page
                if cursor == b"0" or time.monotonic() > self._end:
                    break
            self.complete = self.complete and cursor == b"0"


def _scan(cursor: bytes, pattern: str) -> Command[tuple[bytes, list[str]]]:
    def decode(reply: Reply) -> tuple[bytes, list[str]]:
        match reply:
            case [bytes(after), list(found)]:
                return after, [key.decode(errors="replace") for key in found if isinstance(key, bytes)]
        raise AgentPerfError(f"SCAN had an unexpected reply {str(reply)[:200]}")

    return Command("SCAN", (), (cursor.decode(), "MATCH", pattern, "COUNT", str(PAGE_KEYS)), decode)
