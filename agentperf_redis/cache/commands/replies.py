"""Common parts of the replies of a cache's scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from agentperf_redis.command import Reply
from agentperf_redis.errors import CorruptState, shown

Found: TypeAlias = tuple[bytes | None, bytes | None]
"""An entry and the cache's invalidation epochs, as stored; each is None if it does not exist."""


class NoSettings:
    """The shard has no settings: it is new, the server lost its data, or its entries move to another layout.

    The caller deploys the settings, learns the layout from the reply, and then tries again.
    """


NO_SETTINGS = NoSettings()


def texts(reply: Reply, count: int | None = None) -> list[bytes | None]:
    """Check that a reply is a list of byte strings or None, and return it. `count` is the required length."""
    if not isinstance(reply, list) or not all(part is None or isinstance(part, bytes) for part in reply):
        raise unexpected("a cache", reply)
    if count is not None and len(reply) != count:
        raise unexpected("a cache", reply)
    return reply


def left_over(meta: str) -> Callable[[Reply], int]:
    """Return a decoder for a deletion's reply: 0 if all is deleted, else the number of things that prevent this.

    Args:
        meta: the key to name in an error.
    """

    def decode(reply: Reply) -> int:
        match reply:
            case [1]:
                return 0
            case [0, int(left)]:
                return left
        raise unexpected(meta, reply)

    return decode


def unexpected(key: str, reply: Reply) -> CorruptState:
    """Return the error for a reply in a form that no script returns."""
    return CorruptState(key, f"data for which a script returns {shown(reply)}")
