"""What all replies of the balancer's scripts have in common: a status first, and what a bad one means."""

from __future__ import annotations

from enum import IntEnum

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.model import LoadBalancingStrategy
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Reply
from agentperf_redis.errors import AgentPerfError, CorruptState, InvalidArgument, SchemaMismatch, shown

SCHEMA = "2"
"""Major version of the records, as #pool names it; records.lua has the same. Up to 1 they were packed by position."""


class Status(IntEnum):
    """First item of every reply, as records.lua has them."""

    DONE = 1
    NOTHING = 0
    SPENT = -1
    OTHER_STRATEGY = -2
    OTHER_SCHEMA = -3
    CORRUPT = -4
    TOO_LATE = -6
    UNKNOWN_STRATEGY = -7


def opened(pool: Pool, reply: Reply) -> tuple[int, list[Reply]]:
    """Part a reply into its status and the rest."""
    if isinstance(reply, int):
        return reply, []
    if isinstance(reply, list) and reply and isinstance(reply[0], int):
        return reply[0], reply[1:]
    raise CorruptState(pool.keys.state, f"an unexpected reply {shown(reply)}")


def refusal(
    pool: Pool, status: int, values: list[Reply], wanted: LoadBalancingStrategy | None = None
) -> AgentPerfError:
    """Return the error that a status other than the good ones means."""
    said = values[0].decode(errors="replace") if values and isinstance(values[0], bytes) else ""
    if status == Status.OTHER_STRATEGY and wanted is not None:
        return InvalidArgument(
            "strategy",
            wanted.value,
            f"{said!r}, by which pool {pool.agent_type!r} was registered, or None to take the pool's own; to change "
            "it, remove all its instances and register them with the new one",
        )
    if status == Status.OTHER_SCHEMA:
        # "schema=3 strategy=...", and before schema 2 "1 least_loaded"
        return SchemaMismatch(pool.keys.state, said.partition(" ")[0].removeprefix("schema="), SCHEMA)
    if status == Status.UNKNOWN_STRATEGY:
        known = ", ".join(each.value for each in LoadBalancingStrategy)
        return InvalidArgument("strategy", said, f"one of {known}, which the scripts of this version know")
    if status == Status.CORRUPT:
        return CorruptState(pool.keys.state, f"something that was not written by us in the field {shown(said)}")
    return CorruptState(pool.keys.state, f"an unexpected reply {status} {shown(values)}")


def text_of(pool: Pool, value: Reply) -> str:
    """Return a part of a reply that is a text."""
    if not isinstance(value, bytes):
        raise CorruptState(pool.keys.state, f"{shown(value)} where a text belongs")
    return value.decode(errors="replace")


def strategy_of(pool: Pool, value: Reply) -> LoadBalancingStrategy:
    """Return the strategy a reply names."""
    text = text_of(pool, value)
    try:
        return LoadBalancingStrategy(text)
    except ValueError:
        raise CorruptState(pool.keys.state, f"the strategy {shown(text)}") from None


def settings_of(pool: Pool, value: Reply) -> PoolSettings | None:
    """Return the settings a reply has; None for none."""
    text = text_of(pool, value)
    try:
        return PoolSettings.unpacked(text) if text else None
    except ValueError:
        raise CorruptState(pool.keys.state, f"the settings {shown(text)}") from None
