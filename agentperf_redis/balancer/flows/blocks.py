"""Flows that begin and end a `with` block that holds a lease."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, Refused
from agentperf_redis.balancer.flows.acquiring import LeaseRequest, acquire
from agentperf_redis.balancer.flows.queue import Queues
from agentperf_redis.balancer.flows.releasing import release
from agentperf_redis.balancer.layouts import Layouts
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, LeaseLost, NoCapacity

_log = logging.getLogger("agentperf_redis")

_EXPLAINED = 100
"""When a call with labels is refused, the reason is detailed only for pools of at most this many instances."""


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


def leave(keeper: LeaseKeeper, lease: Lease, error: BaseException | None) -> Flow[None]:
    """End a `with` block that held a lease.

    Raises:
        LeaseLost: when the block succeeded, but the lease was lost while the block ran.
    """
    if not lease.is_own:  # this process was forked within the block, so the lease belongs to the parent
        return
    response_time = time.monotonic() - lease.started
    outcome = _outcome(error) if lease.outcome is None else Outcome(lease.outcome)
    was_held = lease.held
    try:
        freed = yield from release(keeper, lease, outcome, response_time)
    except BackendUnavailable as unavailable:
        # The work is done, so no error is raised. A retry in the background releases the lease, or the lease expires.
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
