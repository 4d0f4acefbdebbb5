"""Flows that acquire a lease or wait for one, in a pool, its shards and its fallback pools."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import ANY, Choice, Granted, Pool, Refused, Spent
from agentperf_redis.balancer.flows.elsewhere import Elsewhere
from agentperf_redis.balancer.flows.queue import NEW_POSITION, QueueEntry, Queues, wait_in_queue
from agentperf_redis.balancer.flows.undoing import or_undo
from agentperf_redis.balancer.layouts import Layout, over_shards
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.command import Command, Flow
from agentperf_redis.errors import BackendUnavailable, LeaseLost

T = TypeVar("T")

DEFAULT_TTL_S = 30.0
DEFAULT_MAX_HOLD_S = 3600.0
_SLACK_S = 0.01
NEW_TOKENS = 3
"""Max tokens that one call may try.

A call needs another token if its lease expires before the reply arrives. This happens only if the TTL is too short.
"""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """The checked arguments of `acquire` and `lease`.

    Attributes:
        choice: which instances may be picked, and how.
        wait: max seconds in the queue when no instance has free capacity.
        priority: the caller is queued as if it had arrived this many seconds earlier.
        ttl: seconds after which the lease expires unless it is renewed.
        max_hold: seconds after which the lease is no longer renewed.
        on_lost: called on a background thread when the lease is lost.
        tokens: expected tokens of the work, counted against the instance's tokens per minute.
        fallback: pools to try, in this order, when the requested pool has no free capacity.
    """

    choice: Choice = ANY
    wait: float = 0.0
    priority: int = 0
    ttl: float = DEFAULT_TTL_S
    max_hold: float = DEFAULT_MAX_HOLD_S
    on_lost: Callable[[LeaseLost], None] | None = None
    tokens: int = 0
    fallback: tuple[Pool, ...] = ()


def acquire(keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest) -> Flow[Lease | Refused]:
    """Lease one unit of an instance, or return the refusal. Waits in the queue for at most `request.wait` seconds.

    When the pool has no free unit, the fallback pools are tried without waiting: once before the wait in the pool's
    queue, and again when `wait` is over.
    """
    if not request.fallback:
        return (yield from _acquire_in(keeper, queues, pool, request))
    answer = yield from _acquire_in(keeper, queues, pool, replace(request, wait=0.0))
    fallback = replace(request, wait=0.0, choice=replace(request.choice, strategy=None))
    if isinstance(answer, Refused):
        other = yield from _acquire_in_fallback(keeper, queues, fallback)
        if other is not None:
            return other
        if request.wait > 0:
            answer = yield from _acquire_in(keeper, queues, pool, request)
            if isinstance(answer, Refused):
                other = yield from _acquire_in_fallback(keeper, queues, fallback)
                if other is not None:
                    return other
    return answer


def _acquire_in_fallback(keeper: LeaseKeeper, queues: Queues, request: LeaseRequest) -> Flow[Lease | None]:
    """Lease a unit in the first fallback pool that has free capacity; None if all are full."""
    for pool in request.fallback:
        answer = yield from _acquire_in(keeper, queues, pool, request)
        if isinstance(answer, Lease):
            return answer
    return None


def _acquire_in(keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest) -> Flow[Lease | Refused]:
    """Lease one unit of an instance of this pool, or return the refusal. Does not try the fallback pools."""
    acquiring = partial(_acquire_over, keeper, queues, request, time.monotonic() + request.wait)
    return (yield from over_shards(keeper.layouts, pool, acquiring, _has_no_instance))


def _has_no_instance(answer: object) -> bool:
    return isinstance(answer, Refused) and answer.registered == 0


def _acquire_over(
    keeper: LeaseKeeper, queues: Queues, request: LeaseRequest, until: float, layout: Layout
) -> Flow[Lease | Refused]:
    """Try the shards one after the other. If none has a free unit, wait in the queue of one shard.

    Args:
        keeper: the lease keeper.
        queues: this process's waiters.
        request: the request.
        until: when the wait ends, by time.monotonic. The wait may have begun with another number of shards.
        layout: the shards of the pool.
    """
    begin = time.monotonic()
    if begin + request.wait > until + _SLACK_S:
        request = replace(request, wait=max(0.0, until - begin))
    if not layout.is_divided:
        return (yield from _acquire_from(keeper, queues, layout.shards[0], request))
    without_wait = replace(request, wait=0.0) if request.wait > 0 else request
    refused: dict[Pool, Refused] = {}
    away: BackendUnavailable | None = None
    for shard in layout.in_order(request.choice.affinity):
        if away is not None and layout.is_away(shard):  # wait only once for a node that does not answer
            continue
        try:
            answer = yield from _acquire_from(keeper, queues, shard, without_wait)
        except BackendUnavailable as error:
            layout.lose(shard)
            away = error
        else:
            if isinstance(answer, Lease):
                return answer
            refused[shard] = answer
            if not request.choice.require:
                layout.full(shard)
    take = partial(_take, keeper, queues, layout, without_wait)
    while True:
        if not refused:
            assert away is not None  # noqa: S101  no shard that refused is left: the last one was lost
            raise away
        whole = Refused.of_all(refused.values())
        left = until - time.monotonic()
        if left <= 0:
            return whole
        # The call waits in the shard with the fewest waiters per instance. Shards without instances come last.
        shard = min(refused, key=lambda each: (refused[each].registered == 0, refused[each].crowd))
        try:
            waiting = replace(request, wait=left)
            return (yield from _acquire_from(keeper, queues, shard, waiting, whole, layout, take))
        except BackendUnavailable as error:  # wait in another shard
            layout.lose(shard)
            del refused[shard]
            away = error


def _take(
    keeper: LeaseKeeper, queues: Queues, layout: Layout, request: LeaseRequest, shard: Pool
) -> Flow[Lease | None]:
    """Lease a unit of a shard; None if no unit is free or the shard cannot be reached. `request.wait` must be 0."""
    try:
        answer = yield from _acquire_from(keeper, queues, shard, request)
    except BackendUnavailable:
        layout.lose(shard)
        return None
    return answer if isinstance(answer, Lease) else None


def _acquire_from(
    keeper: LeaseKeeper,
    queues: Queues,
    pool: Pool,
    request: LeaseRequest,
    refused: Refused | None = None,
    layout: Layout | None = None,
    take: Callable[[Pool], Flow[Lease | None]] | None = None,
) -> Flow[Lease | Refused]:
    """Lease one unit of an instance of this shard, or return the refusal.

    Args:
        keeper: the lease keeper.
        queues: this process's waiters.
        pool: the shard.
        request: the request.
        refused: the refusal of an earlier attempt; the flow then only waits. If None, the flow first tries to lease a
            unit without waiting.
        layout: the shards of the pool, if the wait may end in another shard.
        take: leases a unit of another shard without waiting; returns None if no unit is free.
    """
    keeper.used(pool)
    until = time.monotonic() + request.wait
    ttl_ms, tombstone_ms = math.ceil(request.ttl * 1000), keeper.tombstone_ms(request.ttl)
    position = NEW_POSITION
    for _ in range(NEW_TOKENS):
        token = keeper.token()
        if refused is None:
            command = partial(commands.acquire, pool, token, ttl_ms, request.choice, request.tokens)
            acquiring = requested(keeper, pool, command)
            undoing = partial(commands.release, pool, token, tombstone_ms=tombstone_ms)
            answer, sent_at = yield from or_undo(keeper, undoing, request.ttl, acquiring)
            if isinstance(answer, Granted):
                return (yield from _make_lease(keeper, pool, token, request, answer, sent_at))
            if isinstance(answer, Spent):
                continue
            refused = answer
        if request.wait <= 0:
            return refused
        entry = QueueEntry(
            pool,
            token,
            ttl_ms,
            request.priority,
            request.choice.require,
            position,
            tombstone_ms,
            request.tokens,
        )
        undoing = partial(commands.release, pool, token, tombstone_ms=tombstone_ms)
        if layout is None or take is None:
            waiting = wait_in_queue(queues, entry, until)
            queued = yield from or_undo(keeper, undoing, request.ttl, waiting, in_queue=True)
        else:
            whole = keeper.layouts.whole(pool)
            with Elsewhere(queues, whole, layout, pool, token, request.choice.require, take) as others:
                waiting = wait_in_queue(queues, entry, until, others)
                queued = yield from or_undo(keeper, undoing, request.ttl, waiting, in_queue=True)
        if queued.moved is not None:
            keeper.undo(undoing(), request.ttl)
            return queued.moved
        if queued.granted is not None:
            return (yield from _make_lease(keeper, pool, token, request, queued.granted, queued.sent_at))
        if not queued.spent:
            return replace(refused, retry_after=queued.retry_after, waiting=queued.ahead)
        position = queued.position
    raise LeaseLost(pool.agent_type, token, f"{NEW_TOKENS} leases in a row expired before the reply arrived")


def requested(
    keeper: LeaseKeeper, pool: Pool, command: Callable[[], Command[T | Refused | Spent]]
) -> Flow[tuple[T | Refused | Spent, float]]:
    """Request leases without waiting in the queue.

    One run of the script ends a limited number of expired leases. If the request is refused while expired leases
    remain, the request is retried. The request is also retried, once, if the server has no instances of the pool, but
    this process can register its own instances again.

    Returns:
        The answer, and the value of time.monotonic when the request of this answer was sent.
    """
    until = time.monotonic() + keeper.deadline
    looked = False
    while True:
        sent_at = time.monotonic()
        answer = yield from command()
        if not isinstance(answer, Refused) or sent_at > until:
            return answer, sent_at
        if answer.registered == 0 and not looked:
            looked = True
            if not (yield from keeper.registrations.restore(pool)):
                return answer, sent_at
        elif answer.retry_after > 0:
            return answer, sent_at


def _make_lease(
    keeper: LeaseKeeper, pool: Pool, token: str, request: LeaseRequest, granted: Granted, sent_at: float
) -> Flow[Lease]:
    lease = new_lease(keeper, pool, token, request, granted, sent_at)
    if not keeper.hold(lease):
        lease.end()
        yield from commands.release(pool, token, lease.instance_id)
        raise keeper.closed_error()
    return lease


def new_lease(
    keeper: LeaseKeeper, pool: Pool, token: str, request: LeaseRequest, granted: Granted, sent_at: float
) -> Lease:
    """Make the lease of a granted token. A divided pool learns from the grant how full the shard is."""
    if pool.shards > 1:
        keeper.layouts.of(pool).hear(pool, granted.load, granted.cap)
    return Lease(
        keeper,
        pool,
        token,
        granted.fence,
        granted.facts,
        ttl=request.ttl,
        sent_at=sent_at,
        max_hold=request.max_hold,
        on_lost=request.on_lost,
        tokens=request.tokens,
    )


def acquire_instance(
    keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest
) -> Flow[AgentInstance | None]:
    """Lease one unit. Returns the instance, which carries the lease, or None when there is no capacity."""
    answer = yield from acquire(keeper, queues, pool, request)
    return answer.instance if isinstance(answer, Lease) else None
