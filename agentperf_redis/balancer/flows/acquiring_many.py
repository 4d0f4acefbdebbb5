"""Flows that acquire several leases at once."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, Refused, Spent
from agentperf_redis.balancer.flows.acquiring import NEW_TOKENS, LeaseRequest, acquire, new_lease, requested
from agentperf_redis.balancer.flows.queue import Queues
from agentperf_redis.balancer.flows.undoing import or_undo
from agentperf_redis.balancer.layouts import Layout, over_shards
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendUnavailable, LeaseLost


def acquire_many(
    keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest, count: int, whole: bool
) -> Flow[list[Lease]]:
    """Lease up to `count` units. If none is free, wait in the queue for the first unit, at most `request.wait` seconds.

    Args:
        keeper: the lease keeper.
        queues: this process's waiters.
        pool: the pool.
        request: the parameters of each lease. If the pool has too few free units, the missing leases are requested from
            the fallback pools; with `whole`, all leases are requested from the next pool.
        count: the number of leases, at most `commands.MANY`.
        whole: whether to lease either `count` units of one pool or none. If True, `request.wait` must be 0.
    """
    got: list[Lease] = []
    fallback = replace(request, choice=replace(request.choice, strategy=None))
    finished = False
    try:
        for each in (pool, *request.fallback):
            if len(got) < count:
                chosen = request if each is pool else fallback
                got += yield from _acquire_some(keeper, each, chosen, count - len(got), whole)
        if not got and request.wait > 0:
            first = yield from acquire(keeper, queues, pool, request)
            if isinstance(first, Lease):
                got.append(first)
                its = next(each for each in (pool, *request.fallback) if each.agent_type == first.agent_type)
                if count > 1:
                    got += yield from _acquire_some(keeper, its, request if its is pool else fallback, count - 1, whole)
        finished = True
        return got
    finally:
        if not finished:
            _give_back(keeper, got)


def _acquire_some(keeper: LeaseKeeper, pool: Pool, request: LeaseRequest, count: int, whole: bool) -> Flow[list[Lease]]:
    """Lease up to `count` units of a pool, usually in one request per shard. Does not wait or try fallback pools."""
    return (
        yield from over_shards(
            keeper.layouts, pool, partial(_acquire_some_over, keeper, request, count, whole), operator.not_
        )
    )


def _acquire_some_over(
    keeper: LeaseKeeper, request: LeaseRequest, count: int, whole: bool, layout: Layout
) -> Flow[list[Lease]]:
    """Lease units in the shards of a pool, in proportion to their free shares.

    With an affinity, the shards are tried one after the other instead. If units are missing, all shards are tried for
    the missing units.
    """
    if not layout.is_divided:
        return (yield from _acquire_some_from(keeper, layout.shards[0], request, count, whole))
    got: list[Lease] = []
    away: BackendUnavailable | None = None
    finished = False
    affine = request.choice.affinity is not None
    shares = [(each, count) for each in layout.in_order(request.choice.affinity)] if affine else layout.split(count)
    try:
        for shard, number in itertools.chain(list(shares), ((each, count) for each in layout.in_order())):
            missing = min(number, count - len(got))
            if missing <= 0 or (away is not None and layout.is_away(shard)):
                continue
            try:
                found = yield from _acquire_some_from(keeper, shard, request, missing, False)
            except BackendUnavailable as error:
                layout.lose(shard)
                away = error
            else:
                got += found
                if len(found) < missing and not request.choice.require:
                    layout.full(shard)
        if away is not None and not got:
            raise away
        finished = len(got) == count or not whole
        return got if finished else []
    finally:
        if not finished:
            _give_back(keeper, got)


def _give_back(keeper: LeaseKeeper, leases: Iterable[Lease]) -> None:
    """Release leases in the background."""
    for lease in leases:
        if lease.end():
            keeper.drop(lease)
            keeper.undo(commands.release(lease.pool, lease.token, lease.instance_id), lease.ttl)


def _acquire_some_from(
    keeper: LeaseKeeper, pool: Pool, request: LeaseRequest, count: int, whole: bool
) -> Flow[list[Lease]]:
    """Lease up to `count` units of a shard in one request."""
    keeper.used(pool)
    ttl_ms, tombstone_ms = math.ceil(request.ttl * 1000), keeper.tombstone_ms(request.ttl)
    for _ in range(NEW_TOKENS):
        tokens = tuple(keeper.token() for _ in range(count))
        command = partial(commands.acquire_many, pool, tokens, ttl_ms, request.choice, request.tokens, whole=whole)
        undoing = partial(_releases, pool, tokens, tombstone_ms)
        answer, sent_at = yield from or_undo(keeper, undoing, request.ttl, requested(keeper, pool, command))
        if isinstance(answer, Refused):
            return []
        if isinstance(answer, Spent):  # an earlier copy of the request may have been granted leases
            keeper.undo(undoing(), request.ttl)
            continue
        leases = [new_lease(keeper, pool, token, request, each, sent_at) for token, each in answer.items()]
        if not all(keeper.hold(lease) for lease in leases):  # the keeper was closed: hold none of them
            for lease in leases:
                lease.end()
                keeper.drop(lease)
            yield from undoing().settled()
            raise keeper.closed_error()
        return leases
    raise LeaseLost(pool.agent_type, tokens[0], f"{NEW_TOKENS} requests in a row expired before the reply arrived")


def _releases(pool: Pool, tokens: tuple[str, ...], tombstone_ms: int) -> Batch[bool]:
    return Batch(tuple(commands.release(pool, token, tombstone_ms=tombstone_ms) for token in tokens))


def acquire_instances(
    keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest, count: int, whole: bool
) -> Flow[list[AgentInstance]]:
    """Lease up to `count` units. Returns the instances, each with its lease."""
    return [lease.instance for lease in (yield from acquire_many(keeper, queues, pool, request, count, whole))]
