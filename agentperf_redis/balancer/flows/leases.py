"""Flows that acquire and release leases, wait for a lease, and hold one during a `with` block."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import ANY, Choice, Granted, Pool, Refused, Spent, TooLate
from agentperf_redis.balancer.flows.elsewhere import Elsewhere
from agentperf_redis.balancer.flows.queue import NEW_POSITION, QueueEntry, Queues, wait_in_queue
from agentperf_redis.balancer.layouts import Layout, Layouts, over_shards
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import AgentInstance, Outcome
from agentperf_redis.command import Batch, Command, Flow, Wait
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, LeaseLost, NoCapacity, ScriptFailed

T = TypeVar("T")

_log = logging.getLogger("agentperf_redis")

DEFAULT_TTL_S = 30.0
DEFAULT_MAX_HOLD_S = 3600.0
DEFAULT_REST_S = 5.0
"""Rest of an instance that refused work because of its rate limit and named no time, s. The value is litellm's."""
_CANCELLED_WAIT_S = 0.25
"""How long a cancelled caller waits for the release of its lease, s. A slower release continues in the background."""
_EXPLAINED = 100
"""When a call with labels is refused, the reason is detailed only for pools of at most this many instances."""
_SLACK_S = 0.01
_NEW_TOKENS = 3
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
            assert away is not None  # noqa: S101  each shard refused the request or could not be reached
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
    for _ in range(_NEW_TOKENS):
        token = keeper.token()
        if refused is None:
            command = partial(commands.acquire, pool, token, ttl_ms, request.choice, request.tokens)
            acquiring = _request(keeper, pool, command)
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
    raise LeaseLost(pool.agent_type, token, f"{_NEW_TOKENS} leases in a row expired before the reply arrived")


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
    for _ in range(_NEW_TOKENS):
        tokens = tuple(keeper.token() for _ in range(count))
        command = partial(commands.acquire_many, pool, tokens, ttl_ms, request.choice, request.tokens, whole=whole)
        undoing = partial(_releases, pool, tokens, tombstone_ms)
        answer, sent_at = yield from or_undo(keeper, undoing, request.ttl, _request(keeper, pool, command))
        if isinstance(answer, Refused):
            return []
        if isinstance(answer, Spent):  # some of these tokens may still have a lease
            keeper.undo(undoing(), request.ttl)
            continue
        leases = [_new_lease(keeper, pool, token, request, each, sent_at) for token, each in answer.items()]
        if not all(keeper.hold(lease) for lease in leases):  # the keeper was closed: hold none of them
            for lease in leases:
                lease.end()
                keeper.drop(lease)
            yield from undoing().settled()
            raise keeper.closed_error()
        return leases
    raise LeaseLost(pool.agent_type, tokens[0], f"{_NEW_TOKENS} requests in a row expired before the reply arrived")


def _releases(pool: Pool, tokens: tuple[str, ...], tombstone_ms: int) -> Batch[bool]:
    return Batch(tuple(commands.release(pool, token, tombstone_ms=tombstone_ms) for token in tokens))


def _request(
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
    lease = _new_lease(keeper, pool, token, request, granted, sent_at)
    if not keeper.hold(lease):
        lease.end()
        yield from commands.release(pool, token, lease.instance_id)
        raise keeper.closed_error()
    return lease


def _new_lease(
    keeper: LeaseKeeper, pool: Pool, token: str, request: LeaseRequest, granted: Granted, sent_at: float
) -> Lease:
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


def or_undo(
    keeper: LeaseKeeper,
    undoing: Callable[[], Command[bool] | Batch[bool]],
    ttl: float,
    acquiring: Flow[T],
    *,
    in_queue: bool = False,
) -> Flow[T]:
    """Run the flow that acquires a lease with a token, or several leases with a token each.

    If `acquiring` is interrupted at any point, the tokens are released, so that no lease or queue entry is left behind.

    Args:
        keeper: the lease keeper, which retries the release.
        undoing: returns the command that releases the token, or the commands for all tokens.
        ttl: TTL of the lease, s.
        acquiring: the flow.
        in_queue: whether the token may be in the queue. If so, it must be released even if the last call had no effect.
    """
    interrupted = True
    try:
        answer = yield from acquiring
        interrupted = False
        return answer
    except AgentPerfError as error:
        interrupted = False
        # If the script failed midway, or its reply could not be decoded, it may still have granted a lease.
        known = isinstance(error, BackendUnavailable) and error.outcome == "not_applied"
        if in_queue or (isinstance(error, (BackendUnavailable, CorruptState, ScriptFailed)) and not known):
            keeper.undo(undoing(), ttl)
        raise
    except GeneratorExit:  # the event loop is shutting down, so this flow can do no more I/O
        interrupted = False
        keeper.undo(undoing(), ttl)
        raise
    except asyncio.CancelledError:
        # The caller may be out of time, and the server unreachable. So wait only briefly, not for a whole deadline.
        interrupted = False
        yield from Wait(keeper.undo(undoing(), ttl), _CANCELLED_WAIT_S)
        raise
    finally:
        if interrupted:
            try:
                yield from undoing()
            except AgentPerfError:
                keeper.undo(undoing(), ttl)


def acquire_instance(
    keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest
) -> Flow[AgentInstance | None]:
    """Lease one unit. Returns the instance, which carries the lease, or None when there is no capacity."""
    answer = yield from acquire(keeper, queues, pool, request)
    return answer.instance if isinstance(answer, Lease) else None


def acquire_instances(
    keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest, count: int, whole: bool
) -> Flow[list[AgentInstance]]:
    """Lease up to `count` units. Returns the instances, each with its lease."""
    return [lease.instance for lease in (yield from acquire_many(keeper, queues, pool, request, count, whole))]


def enter(keeper: LeaseKeeper, queues: Queues, pool: Pool, request: LeaseRequest) -> Flow[Lease]:
    """Lease one unit or raise NoCapacity."""
    answer = yield from acquire(keeper, queues, pool, request)
    if isinstance(answer, Refused):
        require = request.choice.require
        reason, none_exists = answer.reason(pool.agent_type), answer.registered == 0
        if require and answer.registered:
            reason, none_exists = yield from _reason_among(keeper.layouts, pool, require)
        raise NoCapacity(pool.agent_type, reason, answer.retry_after, none_exists and not request.fallback)
    return answer


def _reason_among(layouts: Layouts, pool: Pool, require: frozenset[str]) -> Flow[tuple[str, bool]]:
    """Explain why no instance with these labels is available. The text has details only for small pools.

    Returns:
        The reason, and whether it is certain that no instance has the labels.
    """
    labels = f"the {'label' if len(require) == 1 else 'labels'} {', '.join(map(repr, sorted(require)))}"
    try:
        shards = layouts.of(pool).shards
        pages = yield from Batch(tuple(commands.status(shard, 0, _EXPLAINED) for shard in shards))
    except AgentPerfError:
        pages = [None]
    known = [page for page in pages if page is not None]
    if not known or any(page.next_rank for page in known):
        return f"all instances with {labels}, if any, are full, resting, unhealthy or out of rotation", False
    fitting = [each for page in known for each in page.instances if require <= each.instance.labels]
    if not fitting:
        return f"no instance of {pool.agent_type!r} has {labels}", True
    counts = Counter("full" if each.limit else each.state.value for each in fitting)
    instances = "instance" if len(fitting) == 1 else "instances"
    causes = ", ".join(f"{n} {what}" for what, n in counts.items())
    return f"of {len(fitting)} {instances} with {labels}, {causes}", False


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


def select(layouts: Layouts, pool: Pool, choice: Choice) -> Flow[AgentInstance | None]:
    """Return the instance that `acquire` would pick now, without leasing it."""

    def select_in(layout: Layout) -> Flow[AgentInstance | None]:
        away: BackendUnavailable | None = None
        for shard in layout.in_order(choice.affinity):
            if away is not None and layout.is_away(shard):
                continue
            try:
                found = yield from commands.select(shard, choice)
            except BackendUnavailable as error:
                layout.lose(shard)
                away = error
            else:
                if found is not None:
                    return found
        if away is not None:
            raise away
        return None

    return (yield from over_shards(layouts, pool, select_in))


def release_nothing() -> Flow[bool]:
    """Return False: there is nothing to release if `acquire` returned None."""
    yield from ()
    return False


def leave(keeper: LeaseKeeper, lease: Lease, error: BaseException | None) -> Flow[None]:
    """End a `with` block that held a lease.

    Raises:
        LeaseLost: when the block succeeded, but the lease was lost while the block ran.
    """
    if not lease.is_own:  # this is a child that was forked within the block; the lease belongs to its parent
        return
    response_time = time.monotonic() - lease.started
    outcome = _outcome(error) if lease.outcome is None else Outcome(lease.outcome)
    was_held = lease.held
    try:
        freed = yield from release(keeper, lease, outcome, response_time)
    except BackendUnavailable as unavailable:
        # The work is done, so no error is raised. The lease expires no later than the end of its TTL.
        _log.warning("could not release %r: %s", lease, unavailable)
        return
    if error is None:
        if lease.lost is not None:
            raise lease.lost
        if was_held and not freed:
            raise LeaseLost(
                lease.agent_type, lease.token, "another caller released it, or it expired before it was released"
            )


def _outcome(error: BaseException | None) -> Outcome:
    if error is None:
        return Outcome.OK
    if isinstance(error, TimeoutError):
        return Outcome.TIMEOUT
    if isinstance(error, asyncio.CancelledError) or not isinstance(error, Exception):
        return Outcome.NEUTRAL
    return Outcome.ERROR
