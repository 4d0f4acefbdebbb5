"""Flows for pools and their instances. The flows for leases are in leases.py."""

from __future__ import annotations

import itertools
import logging
import math
import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Page, Pool, PoolIsDivided, Removed, TooLate
from agentperf_redis.balancer.flows.acquiring import DEFAULT_TTL_S
from agentperf_redis.balancer.layouts import Layout, Layouts, over_shards
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import (
    InstanceStatus,
    LeaseStatus,
    LoadBalancingStrategy,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    Repaired,
    WaiterStatus,
)
from agentperf_redis.balancer.registrations import Registered, Registrations
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Batch, Flow, Pause
from agentperf_redis.errors import AgentPerfError

_log = logging.getLogger("agentperf_redis")

STATUS_PAGE = 500
REPAIR_PAGE = 500
_FIRST_LOOK_S, _LAST_LOOK_S = 0.02, 0.5


def register(
    backend: Backend,
    registrations: Registrations,
    wanted: Registered,
    shards: int | None,
) -> Flow[LoadBalancingStrategy]:
    """Add or change an instance. This process remembers the instance in case the server loses its data."""
    agent_type = wanted.instance.agent_type
    yield from backend.enter("lb", agent_type)
    pool = Pool.of(backend.namespace, agent_type)
    if shards is not None:
        yield from registrations.divide(pool, shards, wanted.strategy, None)
    reply = yield from registrations.place(pool, wanted)
    registrations.remember(replace(wanted, born=reply.born))
    if reply.is_first:  # an empty pool may have been removed from the list of resources
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


def divide(
    backend: Backend,
    clock: ServerClock,
    registrations: Registrations,
    pool: Pool,
    shards: int,
    strategy: LoadBalancingStrategy | None,
    settings: PoolSettings | None,
) -> Flow[None]:
    """Divide a pool into shards, before its first instance is registered."""
    yield from backend.enter("lb", pool.agent_type)
    before = yield from registrations.divide(pool, shards, strategy, settings)
    if before and settings is not None:
        yield from registrations.deploy(pool, settings)
        _log_change(pool, before, settings)
    yield from _let_lapse(clock, registrations, pool)


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

    def remove_in(layout: Layout) -> Flow[Removed | None]:
        home = layout.home(instance_id)
        return clock.before_deadline(home, partial(commands.remove, home, instance_id))

    done = yield from over_shards(registrations.layouts, pool, remove_in)
    if done is not None and done.is_empty:
        yield from _unlist(backend, clock, registrations, pool)
    return done is not None


def delete(backend: Backend, clock: ServerClock, registrations: Registrations, pool: Pool) -> Flow[bool]:
    """Delete a pool, and forget this process's registrations in it."""
    for agent_type, instance_id in list(registrations.registered):
        if agent_type == pool.agent_type:
            registrations.forget(agent_type, instance_id)

    def delete_in(layout: Layout) -> Flow[bool]:
        existed = False
        for shard in layout.shards:
            if (yield from clock.before_deadline(shard, partial(commands.delete, shard))):
                existed = True
        if layout.is_divided:
            done = yield from clock.before_deadline(
                pool, partial(commands.divide, pool, "drop", len(layout.shards), None, None)
            )
            existed = existed or done.shards == len(layout.shards)
            # After this flow deleted a shard, another process may have registered an instance in the shard. Other
            # processes do not find the instance until the pool is divided again. The registering process may die before
            # it divides the pool. So delete the shard again.
            counts = yield from Batch(tuple(map(commands.count_registered, layout.shards)))
            for shard, count in zip(layout.shards, counts, strict=True):
                if count:
                    yield from clock.before_deadline(shard, partial(commands.delete, shard))
        return existed

    existed = yield from over_shards(registrations.layouts, pool, delete_in, operator.not_)
    yield from _unlist(backend, clock, registrations, pool)
    registrations.layouts.learn(pool.agent_type, 1)  # a new pool has one shard until it is divided
    return existed


def _unlist(backend: Backend, clock: ServerClock, registrations: Registrations, pool: Pool) -> Flow[None]:
    """Remove a pool without instances from the list of resources. Does nothing if a shard has an instance.

    Meanwhile, another process may register an instance and list the pool. This flow would then remove that entry of the
    list. So it counts the instances again after the removal, and lists the pool if there is an instance.
    """
    layout = registrations.layouts.of(pool)
    if layout.is_divided and not (yield from _let_lapse(clock, registrations, pool)):
        return
    yield from backend.leave("lb", pool.agent_type)
    if (yield from _count(layout)):
        yield from backend.enter("lb", pool.agent_type, again=True)


def _let_lapse(clock: ServerClock, registrations: Registrations, pool: Pool) -> Flow[bool]:
    """Let the division of a pool without instances expire in a day. Returns whether the pool has no instance."""
    layout = registrations.layouts.of(pool)
    if not layout.is_divided or (yield from _count(layout)):
        return False
    yield from clock.before_deadline(pool, partial(commands.divide, pool, "lapse", len(layout.shards), None, None))
    if (yield from _count(layout)):  # an instance was registered meanwhile, so the division must stay
        yield from registrations.divide(pool, len(layout.shards), None, None)
        return False
    return True


def _count(layout: Layout) -> Flow[int]:
    """Count the instances of a pool."""
    return sum((yield from Batch(tuple(commands.count_registered(shard) for shard in layout.shards))))


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
    load = yield from _update(
        clock,
        registrations,
        pool,
        instance_id,
        max_capacity=max_capacity,
        weight=weight,
        labels=labels,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
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


def _update(
    clock: ServerClock, registrations: Registrations, pool: Pool, instance_id: str, **changes: Any
) -> Flow[int | None]:
    """Change an instance. Returns its load, or None when it is not registered."""

    def update_in(layout: Layout) -> Flow[int | None]:
        home = layout.home(instance_id)
        return clock.before_deadline(
            home, lambda until_ms: commands.update(home, instance_id, until_ms=until_ms, **changes)
        )

    return (yield from over_shards(registrations.layouts, pool, update_in))


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
    load = yield from _update(clock, registrations, pool, instance_id, on=on, off=off)
    if load is None:
        return False
    registrations.mark(pool.agent_type, instance_id, on=on, off=off)
    return True


def cool_down(clock: ServerClock, layouts: Layouts, pool: Pool, instance_id: str, seconds: float) -> Flow[bool]:
    """Let an instance rest. Returns whether the instance is registered."""
    rest_ms = math.ceil(seconds * 1000)

    def cool_down_in(layout: Layout) -> Flow[bool]:
        home = layout.home(instance_id)
        return clock.before_deadline(
            home, lambda until_ms: commands.cool_down(home, instance_id, rest_ms, "cooled_down", until_ms)
        )

    return (yield from over_shards(layouts, pool, cool_down_in, operator.not_))


def heartbeat(layouts: Layouts, pool: Pool, instance_ids: tuple[str, ...], heartbeat_ttl_ms: int) -> Flow[list[str]]:
    """Report that instances are alive. Returns the instances that are not registered.

    If a shard cannot be reached, the heartbeats of the other shards are sent before the error is raised.
    """

    def heartbeat_in(layout: Layout) -> Flow[list[str]]:
        names: dict[Pool, list[str]] = {}
        for name in instance_ids:
            names.setdefault(layout.home(name), []).append(name)
        requests = [
            commands.heartbeat(shard, its[at : at + commands.MANY], heartbeat_ttl_ms)
            for shard, its in names.items()
            for at in range(0, len(its), commands.MANY)
        ]
        unknown = set(itertools.chain.from_iterable((yield from Batch(tuple(requests)))))
        return [name for name in instance_ids if name in unknown]

    return (yield from over_shards(layouts, pool, heartbeat_in, bool))


def status(
    backend: Backend, clock: ServerClock, registrations: Registrations, agent_types: Iterable[str] | None = None
) -> Flow[list[PoolStatus]]:
    """Read the named pools, or all pools that are in use. Pools without instances are left out."""
    used: list[str] = []
    if agent_types is None:
        used = yield from backend.entered("lb")
        agent_types = sorted({*used, *(of for of, _ in list(registrations.registered))})
    pools = [Pool.of(backend.namespace, name) for name in agent_types]
    first = yield from _first_pages(registrations.layouts, pools)
    found = []
    for pool in pools:
        pages = first[pool]
        if not any(page.instances for _, page in pages) and (yield from registrations.restore(pool)):
            pages = (yield from _first_pages(registrations.layouts, [pool]))[pool]
        if not pages and pool.agent_type in used:  # the pool was empty, so its keys have expired
            is_divided = registrations.layouts.of(pool).is_divided
            if not (is_divided and (yield from commands.count_shards(pool))):
                yield from _unlist(backend, clock, registrations, pool)
        instances: list[InstanceStatus] = []
        for shard, page in pages:
            instances += page.instances
            next_rank = page.next_rank
            while next_rank:
                more = yield from commands.status(shard, next_rank, STATUS_PAGE)
                instances += more.instances if more else ()
                next_rank = more.next_rank if more else 0
        if instances:
            number = len(registrations.layouts.of(pool).shards)
            found.append(_pool_status(pool, [page for _, page in pages], instances, number))
    return found


def _first_pages(layouts: Layouts, pools: list[Pool]) -> Flow[dict[Pool, list[tuple[Pool, Page]]]]:
    """Read the first status page of each shard of the pools. Returns, by pool, the existing shards and their pages.

    If the known shards of a pool have no instances, the cause may be that the number of shards has changed. So this
    number is then read from the server.
    """
    found: dict[Pool, list[tuple[Pool, Page]]] = {}
    left = pools
    while left:
        found.update({pool: [] for pool in left})
        shards = [(pool, shard) for pool in left for shard in layouts.of(pool).shards]
        pages = yield from Batch(tuple(commands.status(shard, 0, STATUS_PAGE) for _, shard in shards)).settled()
        read, left = left, []
        for (pool, shard), page in zip(shards, pages, strict=True):
            if isinstance(page, PoolIsDivided) and not shard.shard:
                layouts.learn(pool.agent_type, page.shards)
                left.append(pool)
            elif isinstance(page, AgentPerfError):
                raise page
            elif page is not None:
                found[pool].append((shard, page))
        empty = [
            pool for pool in read if layouts.of(pool).is_divided and not any(page.instances for _, page in found[pool])
        ]
        empty = [pool for pool in empty if pool not in left]
        counts = yield from Batch(tuple(map(commands.count_shards, empty)))
        for pool, count in zip(empty, counts, strict=True):
            if count and count != len(layouts.of(pool).shards):
                layouts.learn(pool.agent_type, count)
                left.append(pool)
    return found


def _pool_status(pool: Pool, pages: list[Page], instances: list[InstanceStatus], shards: int) -> PoolStatus:
    """Combine the first pages of a pool's shards into the status of the pool."""
    panics = [page.panic_for for page in pages if page.panic_for is not None]
    used = next((page for page in pages if page.instances), pages[0])  # a shard that became empty may keep old settings
    return PoolStatus(
        pool.agent_type,
        used.strategy,
        tuple(instances),
        sum(page.waiting for page in pages),
        sum(page.granted for page in pages),
        sum(page.overdue for page in pages),
        max(panics, default=None),
        used.settings,
        shards,
    )


def leases(layouts: Layouts, pool: Pool) -> Flow[PoolLeases]:
    """Read the leases and waiters of a pool."""
    return (yield from over_shards(layouts, pool, _leases_in, lambda found: not found.leases and not found.waiters))


def _leases_in(layout: Layout) -> Flow[PoolLeases]:
    held: list[LeaseStatus] = []
    waiters: list[WaiterStatus] = []
    for shard in layout.shards:
        rank, going = 0, True
        while going:
            page = yield from commands.leases_page(shard, rank, STATUS_PAGE)
            if page is None:
                break
            held += page.leases
            waiters += page.waiters
            rank, going = page.next_rank, page.next_rank > 0
    if layout.is_divided:
        held.sort(key=lambda lease: lease.expires_in)
    return PoolLeases(
        layout.shards[0].agent_type,
        # Drop duplicates: a lease is read twice if a renewal moves it to a later page.
        tuple({lease.token: lease for lease in held}.values()),
        tuple(sorted({each.token: each for each in waiters}.values(), key=lambda each: -each.waited)),
    )


def end_lease(keeper: LeaseKeeper, pool: Pool, token: str) -> Flow[bool]:
    """End the lease with this token, even a lease of another process; or remove the waiter with this token."""
    tombstone_ms = keeper.tombstone_ms(DEFAULT_TTL_S)

    def end_in(layout: Layout) -> Flow[bool]:
        for shard in layout.shards:
            if (yield from commands.release(shard, token, tombstone_ms=tombstone_ms, by_hand=True)):
                return True
        return False

    return (yield from over_shards(keeper.layouts, pool, end_in, operator.not_))


def repair(layouts: Layouts, pool: Pool, progress: Callable[[int, int], None] | None) -> Flow[Repaired]:
    """Recompute all loads of a pool from its leases, page by page."""
    return (yield from over_shards(layouts, pool, partial(_repair_in, progress), lambda done: not done.instances))


def _repair_in(progress: Callable[[int, int], None] | None, layout: Layout) -> Flow[Repaired]:
    wrong = orphans = registered = 0
    total = (yield from _count(layout)) if layout.is_divided else 0
    for shard in layout.shards:
        first = 0
        while True:
            page = yield from commands.repair(shard, first, REPAIR_PAGE)
            if page is None:
                break
            wrong, orphans = wrong + page.wrong, orphans + page.orphans
            done = registered + (page.next_rank or page.registered)
            if progress is not None:
                of = max(total, registered + page.registered)
                arguments.refuse_unfinished("progress", progress, progress(done, of))
            first = page.next_rank
            if not first:
                registered += page.registered
                break
    return Repaired(registered, wrong, orphans)


def wait_until_idle(layouts: Layouts, pool: Pool, instance_id: str, wait: float) -> Flow[bool]:
    """Wait until an instance has no leases or is not registered. Returns False when `wait` is over first."""
    until = time.monotonic() + wait
    pause = _FIRST_LOOK_S

    def look_in(layout: Layout) -> Flow[int | TooLate | None]:
        # A call of `update` that changes nothing only reads the load, so it needs no time limit.
        return iter(commands.update(layout.home(instance_id), instance_id))

    while True:
        load = yield from over_shards(layouts, pool, look_in)
        if not load:
            return True
        left = until - time.monotonic()
        if left <= 0:
            return False
        yield from Pause(min(pause, left))
        pause = min(2 * pause, _LAST_LOOK_S)


def events(layouts: Layouts, pool: Pool, after: str | None, limit: int) -> Flow[list[PoolEvent]]:
    """Read events of a pool, oldest first. The events of several shards are ordered by the clocks of their servers."""

    def events_in(layout: Layout) -> Flow[list[PoolEvent]]:
        found = yield from Batch(tuple(commands.events(shard, after, limit) for shard in layout.shards))
        if not layout.is_divided:
            return found[0]
        merged = sorted(itertools.chain(*found), key=lambda event: tuple(map(int, event.cursor.split("-"))))
        return merged[-limit:] if after is None else _first_events(merged, limit)

    return (yield from over_shards(layouts, pool, events_in, operator.not_, plain=True))


def _first_events(events: list[PoolEvent], limit: int) -> list[PoolEvent]:
    """Return the first events. Events with the same cursor stay together, since the next page starts after a cursor.

    Two shards may have events with the same cursor, since each counts the events of a millisecond from 0.
    """
    found = events[:limit]
    if len(events) > limit and events[limit].cursor == found[-1].cursor:
        last = found[-1].cursor
        found = [each for each in found if each.cursor != last] or [each for each in events if each.cursor == last]
    return found
