"""Decodes the status at the start of every reply of the balancer's scripts, and returns the error for a refusal."""

from __future__ import annotations

import re
from enum import IntEnum

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.model import LoadBalancingStrategy
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Reply
from agentperf_redis.errors import AgentPerfError, CorruptState, InvalidArgument, SchemaMismatch, shown

SCHEMA = "2"
"""Major version of the record format, as in #pool and records.lua. In version 1, fields had no names."""


_DIVIDED = re.compile(r"shards=(\d{1,3}) strategy=\S+")
"""Matches the value of #pool that layout.lua writes for a pool with several shards."""


class PoolIsDivided(AgentPerfError):
    """Raised when a pool has another number of shards than this process assumed.

    A request that the server refused for this reason has changed nothing. `layouts.over_shards` catches this error and
    repeats the operation.

    Attributes:
        shards: the number of shards.
    """

    def __init__(self, agent_type: str, shards: int) -> None:
        super().__init__(f"the pool {agent_type!r} has {shards} shards")
        self.shards = shards


def shards_in(fact: str) -> int:
    """Parse the number of shards from the value of the field #pool; return 0 if the pool is not divided."""
    found = _DIVIDED.fullmatch(fact)
    return int(found[1]) if found else 0


class Status(IntEnum):
    """The first item of every reply; the same values as in records.lua."""

    DONE = 1
    NOTHING = 0
    SPENT = -1
    OTHER_STRATEGY = -2
    OTHER_SCHEMA = -3
    CORRUPT = -4
    TOO_LATE = -6
    UNKNOWN_STRATEGY = -7


def opened(pool: Pool, reply: Reply) -> tuple[int, list[Reply]]:
    """Split a reply into its status and its other values."""
    if isinstance(reply, int):
        return reply, []
    if isinstance(reply, list) and reply and isinstance(reply[0], int):
        return reply[0], reply[1:]
    raise CorruptState(pool.keys.state, f"an unexpected reply {shown(reply)}")


def refusal(
    pool: Pool, status: int, values: list[Reply], wanted: LoadBalancingStrategy | None = None
) -> AgentPerfError:
    """Return the error for a status that the caller does not handle."""
    text = values[0].decode(errors="replace") if values and isinstance(values[0], bytes) else ""
    if status == Status.OTHER_STRATEGY and wanted is not None:
        return InvalidArgument(
            "strategy",
            wanted.value,
            f"{text!r}, the strategy of pool {pool.agent_type!r}, or None to accept the pool's own; to change "
            "it, remove all its instances and register them with the new one",
        )
    if status == Status.OTHER_SCHEMA and shards_in(text) > 1:
        return PoolIsDivided(pool.agent_type, shards_in(text))
    if status == Status.OTHER_SCHEMA:
        # From schema 2 on, the text begins with "schema=<number> strategy=". In schema 1, it was "1 least_loaded".
        return SchemaMismatch(pool.keys.state, text.partition(" ")[0].removeprefix("schema="), SCHEMA)
    if status == Status.UNKNOWN_STRATEGY:
        known = ", ".join(each.value for each in LoadBalancingStrategy)
        return InvalidArgument("strategy", text, f"one of {known}, which the scripts of this version know")
    if status == Status.CORRUPT:
        return CorruptState(pool.keys.state, f"a value that this library did not write in the field {shown(text)}")
    return CorruptState(pool.keys.state, f"an unexpected reply {status} {shown(values)}")


def text_of(pool: Pool, value: Reply) -> str:
    """Decode a value of a reply as text."""
    if not isinstance(value, bytes):
        raise CorruptState(pool.keys.state, f"{shown(value)} instead of a text")
    return value.decode(errors="replace")


def strategy_of(pool: Pool, value: Reply) -> LoadBalancingStrategy:
    """Decode a value of a reply as a strategy."""
    text = text_of(pool, value)
    try:
        return LoadBalancingStrategy(text)
    except ValueError:
        raise CorruptState(pool.keys.state, f"the strategy {shown(text)}") from None


def settings_of(pool: Pool, value: Reply) -> PoolSettings | None:
    """Decode a value of a reply as settings; None if the text is empty."""
    text = text_of(pool, value)
    try:
        return PoolSettings.unpacked(text) if text else None
    except ValueError:
        raise CorruptState(pool.keys.state, f"the settings {shown(text)}") from None
