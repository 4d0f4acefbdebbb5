"""Flows for pools and their instances. The flows for leases are in leases.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Page, Pool
from agentperf_redis.balancer.flows.leases import DEFAULT_TTL_S
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import (
    LeaseStatus,
    LoadBalancingStrategy,
    PoolLeases,
    PoolStatus,
    Repaired,
    WaiterStatus,
)
from agentperf_redis.balancer.registrations import Registered, Registrations, registration
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Batch, Flow, Pause

_log = logging.getLogger("agentperf_redis")

STATUS_PAGE = 500
REPAIR_PAGE = 500
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 0.5


def register(
    backend: Backend,
    clock: ServerClock,
    registrations: Registrations,
    wanted: Registered,
) -> Flow[LoadBalancingStrategy]:
    """Add or change an instance. This process remembers the instance in case the server loses its data."""
    agent_type = wanted.instance.agent_type
    yield from backend.enter("lb", agent_type)
    pool = Pool.of(backend.namespace, agent_type)
    reply = yield from clock.before_deadline(pool, partial(registration, pool, wanted))
    registrations.remember(replace(wanted, born=reply.born))
    if reply.is_first:  # the pool may have been removed from the list of resources when it was empty
        yield from backend.enter("lb", agent_type, again=True)
    if reply.replaced and wanted.settings is not None:
        yield from registrations.deploy(pool, wanted.settings)
        _log_change(pool, reply.replaced, wanted.settings)
    return reply.strategy


def configure(backend: Backend, registrations: Registrations, pool: Pool, settings: PoolSettings) -> Flow[None]:
    """Set the settings of a pool, and apply them to its instances page by page."""
    yield from backend.enter("lb", pool.agent_type)
    before = yield from registrations.deploy(pool, settings)
    registrations.remember_settings(pool.agent_type, settings)
    if before and before != settings.packed():
        _log_change(pool, before, settings)


def _log_change(pool: Pool, before: str, settings: PoolSettings) -> None:
    """Log which settings of a pool were changed, because the change applies to all processes."""
    old = commands.settings_of(pool, before.encode())
    names = [each.name for each in fields(PoolSettings)]
    changes = [f"{name}={getattr(old, name)} -> {getattr(settings, name)}" for name in names]
    changed = [text for name, text in zip(names, changes, strict=True) if getattr(old, name) != getattr(settings, name)]
    _log.warning("the settings of pool %r were changed: %s", pool.agent_type, ", ".join(changed))


def remove(
    backend: Backend, clock: ServerClock, registrations: Registrations, pool: Pool, instance_id: str
) -> Flow[bool]:
    """Remove an instance, and forget this process's registration of it."""
    registrations.forget(pool.agent_type, instance_id)
    done = yield from clock.before_deadline(pool, partial(commands.remove, pool, instance_id))
    if done is not None and done.is_empty:
        yield from _unlist(backend, pool)
    return done is not None


def delete(backend: Backend, clock: ServerClock, registrations: Registrations, pool: Pool) -> Flow[bool]:
    """Delete a pool, and forget this process's registrations in it."""
    for agent_type, instance_id in list(registrations.registered):
        if agent_type == pool.agent_type:
            registrations.forget(agent_type, instance_id)
    existed = yield from clock.before_deadline(pool, partial(commands.delete, pool))
    yield from _unlist(backend, pool)
    return existed


def _unlist(backend: Backend, pool: Pool) -> Flow[None]:
    """Remove a pool without instances from the list of resources.

    Another process may register an instance meanwhile. It lists the pool again after the registration, which may be
    before this removal. In this case, the instance is found here.
    """
    yield from backend.leave("lb", pool.agent_type)
    if (yield from commands.count_registered(pool)):
        yield from backend.enter("lb", pool.agent_type, again=True)


def update(
    clock: ServerClock,
    registrations: Registrations,
    pool: Pool,
    instance_id: str,
    *,
    max_capacity: int | None,
    weight: float | None,
    labels: frozenset[str] | None,
    requests_per_minute: float | None,
    tokens_per_minute: float | None,
) -> Flow[bool]:
    """Change the fields of an instance on the server and in this process's registration of it."""
    load = yield from clock.before_deadline(
        pool,
        lambda until_ms: commands.update(
            pool,
            instance_id,
            max_capacity=max_capacity,
            weight=weight,
            labels=labels,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            until_ms=until_ms,
        ),
    )
    if load is None:
        return False
    registrations.amend(
        pool.agent_type,
        instance_id,
        max_capacity=max_capacity,
        weight=weight,
        labels=labels,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    return True


def mark(
    clock: ServerClock,
    registrations: Registrations,
    pool: Pool,
    instance_id: str,
    *,
    on: str = "",
    off: str = "",
) -> Flow[bool]:
    """Set and clear flags of an instance. Returns whether the instance is registered."""
    load = yield from clock.before_deadline(
        pool, lambda until_ms: commands.update(pool, instance_id, on=on, off=off, until_ms=until_ms)
    )
    if load is None:
        return False
    registrations.mark(pool.agent_type, instance_id, on=on, off=off)
    return True


def cool_down(clock: ServerClock, pool: Pool, instance_id: str, seconds: float) -> Flow[bool]:
    """Let an instance rest. Returns whether the instance is registered."""
    rest_ms = math.ceil(seconds * 1000)
    return (
        yield from clock.before_deadline(
            pool, lambda until_ms: commands.cool_down(pool, instance_id, rest_ms, "cooled_down", until_ms)
        )
    )


def heartbeat(pool: Pool, instance_ids: tuple[str, ...], heartbeat_ttl_ms: int) -> Flow[list[str]]:
    """Report that instances are alive. Returns the instances that are not registered."""
    unknown: list[str] = []
    for at in range(0, len(instance_ids), commands.MANY):
        unknown += yield from commands.heartbeat(pool, instance_ids[at : at + commands.MANY], heartbeat_ttl_ms)
    return unknown


def status(
    backend: Backend, registrations: Registrations, agent_types: Iterable[str] | None = None
) -> Flow[list[PoolStatus]]:
    """Read the named pools, or all pools that are in use. Pools without instances are left out."""
    used: list[str] = []
    if agent_types is None:
        used = yield from backend.entered("lb")
        agent_types = sorted({*used, *(of for of, _ in list(registrations.registered))})
    pools = [Pool.of(backend.namespace, name) for name in agent_types]
    first: list[Page | None] = yield from Batch(tuple(commands.status(pool, 0, STATUS_PAGE) for pool in pools))
    found = []
    for pool, seen in zip(pools, first, strict=True):
        page = seen
        if (page is None or not page.instances) and (yield from registrations.restore(pool)):
            page = yield from commands.status(pool, 0, STATUS_PAGE)
        if page is None and pool.agent_type in used:  # its keys have expired, since it was empty
            yield from _unlist(backend, pool)
        if page is None or not page.instances:
            continue
        instances = list(page.instances)
        next_rank = page.next_rank
        while next_rank:
            more = yield from commands.status(pool, next_rank, STATUS_PAGE)
            instances += more.instances if more else ()
            next_rank = more.next_rank if more else 0
        found.append(
            PoolStatus(
                pool.agent_type,
                page.strategy,
                tuple(instances),
                page.waiting,
                page.granted,
                page.overdue,
                page.panic_for,
                page.settings,
            )
        )
    return found


def leases(pool: Pool) -> Flow[PoolLeases]:
    """Read the leases and waiters of a pool."""
    held: list[LeaseStatus] = []
    waiters: list[WaiterStatus] = []
    rank, going = 0, True
    while going:
        page = yield from commands.leases_page(pool, rank, STATUS_PAGE)
        if page is None:
            break
        held += page.leases
        waiters += page.waiters
        rank, going = page.next_rank, page.next_rank > 0
    return PoolLeases(
        pool.agent_type,
        tuple({lease.token: lease for lease in held}.values()),  # a renewal may move a lease to a later page
        tuple(sorted({each.token: each for each in waiters}.values(), key=lambda each: -each.waited)),
    )


def end_lease(keeper: LeaseKeeper, pool: Pool, token: str) -> Flow[bool]:
    """End the lease with this token, which another process may hold, or remove the waiter with this token."""
    return (yield from commands.release(pool, token, tombstone_ms=keeper.tombstone_ms(DEFAULT_TTL_S), by_hand=True))


def repair(pool: Pool, progress: Callable[[int, int], None] | None) -> Flow[Repaired]:
    """Recompute all loads of a pool from its leases, page by page."""
    first = wrong = orphans = done = 0
    while True:
        page = yield from commands.repair(pool, first, REPAIR_PAGE)
        if page is None:
            return Repaired(0, 0, 0)
        wrong, orphans = wrong + page.wrong, orphans + page.orphans
        done = page.next_rank or page.registered
        if progress is not None:
            arguments.refuse_unfinished("progress", progress, progress(done, page.registered))
        if not page.next_rank:
            return Repaired(page.registered, wrong, orphans)
        first = page.next_rank


def wait_until_idle(pool: Pool, instance_id: str, wait: float) -> Flow[bool]:
    """Wait until an instance has no leases or is not registered. Returns False when `wait` is over first."""
    until = time.monotonic() + wait
    pause = _FIRST_LOOK_S
    while True:
        load = yield from commands.update(pool, instance_id)  # only reads the load, so it needs no time limit
        if not load:
            return True
        left = until - time.monotonic()
        if left <= 0:
            return False
        yield from Pause(min(pause, left))
        pause = min(2 * pause, _LAST_LOOK_S)
