"""Finds the namespaces in use on a server, for a user who gave a wrong namespace.

No index lists all namespaces, because a user may have rights in its own namespace only. So the search reads the names
of keys, within the bounds of `Scan`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.errors import CorruptState
from agentperf_redis.views.scanning import Scan

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
    scan = Scan(backend, "*:meta")
    for _, page in scan.pages():
        found.update(match[1] for key in page if (match := _META.fullmatch(key)) is not None)
        if len(found) > _MAX_FOUND:
            break
    names = sorted(found - {backend.namespace})[:_MAX_FOUND]
    used = backend.run(_used(names))
    complete = scan.complete and len(found) <= _MAX_FOUND
    return Found([name for name, in_use in zip(names, used, strict=True) if in_use], complete)


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


def _count(where: str, reply: Reply) -> int:
    if not isinstance(reply, int):
        raise CorruptState(where, f"an unexpected reply {reply!r}")
    return reply
