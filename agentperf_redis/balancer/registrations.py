"""What a process registered, and the request that does it: once more, should the server lose it."""

from __future__ import annotations

from dataclasses import dataclass

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, Rates, Taken, TooLate
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Command


@dataclass(frozen=True, slots=True)
class Registered:
    """What this process registered, to do it again when the server lost it.

    Attributes:
        instance: as it is to be: with the changes that this process made since.
        strategy: wanted.
        silence_ms: after which it counts as down; 0 when no heartbeats are expected.
        rates: what it takes a minute.
        settings: chosen for its pool; None when the pool's own will do.
        born: when its pool was founded. Another number than the server's tells that the server lost it in between.
    """

    instance: AgentInstance
    strategy: LoadBalancingStrategy | None
    silence_ms: int
    rates: Rates
    settings: PoolSettings | None
    born: int


def registration(pool: Pool, known: Registered, until_ms: int) -> Command[Taken | TooLate]:
    """Return the request that registers an instance."""
    return commands.register(
        pool,
        known.instance,
        known.strategy,
        known.silence_ms,
        until_ms,
        rates=known.rates,
        settings=known.settings,
    )
