"""Flows that release leases."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import TooLate
from agentperf_redis.balancer.layouts import Layout, over_shards
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import AgentPerfError

DEFAULT_REST_S = 5.0
"""Rest of an instance that refused work because of its rate limit and named no time, s. The value is litellm's."""


def release(keeper: LeaseKeeper, lease: Lease, outcome: Outcome, response_time: float | None) -> Flow[bool]:
    """Release a lease. Returns whether this call freed the unit."""
    command = _ending(keeper, lease, outcome, response_time)
    if command is None:
        if lease.lost is not None:
            yield from _rest_anyway(keeper, lease, outcome)
        return False
    answered = False
    try:
        freed = yield from command
        answered = True
    finally:
        if not answered:  # the caller will not retry, so the keeper retries; releasing twice is harmless
            keeper.retry_in_background(command, lease.ttl)
    if not freed:
        yield from _rest_anyway(keeper, lease, outcome)
    return freed


def release_many(
    keeper: LeaseKeeper, leases: Sequence[tuple[Lease, Outcome]], response_time: float | None
) -> Flow[list[bool]]:
    """Release leases in one round trip. Returns for each lease whether this call freed the unit.

    Raises:
        AgentPerfError: the first error, after all leases were tried. The keeper retries the releases that failed.
    """
    ending = [_ending(keeper, lease, outcome, response_time) for lease, outcome in leases]
    sent = [(number, command) for number, command in enumerate(ending) if command is not None]
    results: list[bool | AgentPerfError | None] = [None] * len(leases)
    try:
        if sent:
            answers = yield from Batch(tuple(command for _, command in sent)).settled()
            for (number, _), answer in zip(sent, answers, strict=True):
                results[number] = answer
    finally:
        for number, command in sent:
            if not isinstance(results[number], bool):
                keeper.retry_in_background(command, leases[number][0].ttl)
    for (lease, outcome), result in zip(leases, results, strict=True):
        if result is False or (result is None and lease.lost is not None):
            yield from _rest_anyway(keeper, lease, outcome)
    for result in results:
        if isinstance(result, AgentPerfError):
            raise result
    return [result is True for result in results]


def _ending(keeper: LeaseKeeper, lease: Lease, outcome: Outcome, response_time: float | None) -> Command[bool] | None:
    """Mark a lease released, and return the command that releases it; None if this process did not hold it."""
    if not lease.end():
        return None
    keeper.drop(lease)
    if lease.pool.shards > 1:
        keeper.layouts.of(lease.pool).released(lease.pool)
    return commands.release(
        lease.pool,
        lease.token,
        lease.instance_id,
        outcome=outcome,
        response_time=response_time,
        tokens=0 if lease.tokens_used is None else lease.tokens_used - lease.tokens,
        rest_ms=_rest_ms(lease, outcome),
    )


def _rest_ms(lease: Lease, outcome: Outcome) -> int:
    """Return for how long the instance rests after this outcome, ms."""
    if outcome is not Outcome.RATE_LIMITED:
        return 0
    return math.ceil((DEFAULT_REST_S if lease.retry_after is None else lease.retry_after) * 1000)


def _rest_anyway(keeper: LeaseKeeper, lease: Lease, outcome: Outcome) -> Flow[None]:
    """Let an instance rest after the outcome rate_limited, although the lease had already ended before its release."""
    rest_ms = _rest_ms(lease, outcome)

    def rest_in(layout: Layout) -> Flow[bool | TooLate]:
        home = layout.home(lease.instance_id)
        return iter(commands.cool_down(home, lease.instance_id, rest_ms, Outcome.RATE_LIMITED.value))

    if rest_ms:
        yield from over_shards(keeper.layouts, keeper.layouts.whole(lease.pool), rest_in, operator.not_)


def release_nothing() -> Flow[bool]:
    """Return False: there is nothing to release if `acquire` returned None."""
    yield from ()
    return False
