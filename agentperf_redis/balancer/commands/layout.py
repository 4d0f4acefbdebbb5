"""Commands that divide a pool into shards, and that watch a shard for waiters in the queue of another shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentperf_redis.balancer.commands.instances import TooLate
from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.records import packed_labels
from agentperf_redis.balancer.commands.replies import (
    Status,
    opened,
    refusal,
    settings_of,
    shards_in,
    strategy_of,
    text_of,
)
from agentperf_redis.balancer.model import LoadBalancingStrategy
from agentperf_redis.balancer.settings import DEFAULT_SETTINGS, PoolSettings
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.script import Script

LAYOUT = Script("balancer/layout")
WATCH = Script("balancer/watch")


@dataclass(frozen=True, slots=True)
class Division:
    """The division of a pool into shards.

    Attributes:
        shards: the number of shards. If it is not the requested number, nothing was changed.
        strategy: the strategy of the pool; None if the pool has one shard or does not have the requested number.
        settings: the settings of the pool; None if `strategy` is None, or if the action was not "set".
        replaced: the replaced settings, packed; empty when none were replaced.
    """

    shards: int
    strategy: LoadBalancingStrategy | None = None
    settings: PoolSettings | None = None
    replaced: str = ""


def divide(
    pool: Pool,
    action: Literal["set", "lapse", "drop"],
    shards: int,
    strategy: LoadBalancingStrategy | None = None,
    settings: PoolSettings | None = None,
    until_ms: int = 0,
) -> Command[Division | TooLate]:
    """Divide a pool into shards; or confirm its division, end it, or let it expire. layout.lua describes the actions.

    Args:
        pool: the whole pool, as a `Pool` with one shard.
        action: the action.
        shards: the number of shards.
        strategy: the strategy that the pool must have; None for any.
        settings: the settings of the pool. If None, an existing pool keeps its settings; a new pool gets defaults.
        until_ms: the server refuses the request after this time, in ms of its clock; 0 for no limit.
    """

    def decode(reply: Reply) -> Division | TooLate:
        match opened(pool, reply):
            case Status.DONE, [int() as found, bytes() as used, bytes() as packed, bytes() as before]:
                return Division(found, strategy_of(pool, used), settings_of(pool, packed), text_of(pool, before))
            case Status.NOTHING, [int() as found]:
                return Division(found)
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values, strategy)

    args: NamedArgs = {
        "action": action,
        "shards": shards,
        "wanted": "-" if strategy is None else strategy.value,
        "settings": (settings or DEFAULT_SETTINGS).packed(),
        "chosen": int(settings is not None),
        "until_ms": until_ms,
    }
    return Command(LAYOUT, pool.keys.all, args, decode)


def count_shards(pool: Pool) -> Command[int]:
    """Read the number of shards of a pool; 0 if there is no such pool, 1 if it is not divided.

    Args:
        pool: the whole pool, as a `Pool` with one shard.
    """

    def decode(reply: Reply) -> int:
        if reply is None:
            return 0
        if not isinstance(reply, bytes):
            raise CorruptState(pool.keys.state, f"an unexpected reply {shown(reply)}")
        return shards_in(reply.decode(errors="replace")) or 1

    return Command("HGET", (pool.keys.state,), ("#pool",), decode)


def watch(pool: Pool, require: frozenset[str], live_ms: int) -> Command[bool]:
    """Return whether a shard has a free instance with these labels. If not, watch the shard for `live_ms`.

    If a script then frees an instance, and no waiter in the queue of this shard gets it, the script publishes the
    message "free" on the shard's channel of grants. This ends the watch.
    """

    def decode(reply: Reply) -> bool:
        match opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case status, values:
                raise refusal(pool, status, values)

    return Command(WATCH, pool.keys.core, {"labels": packed_labels(require), "live_ms": live_ms}, decode)
