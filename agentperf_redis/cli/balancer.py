"""`agentperf lb ...`: show pools, their leases, queues and events, and change or repair them by hand."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from agentperf_redis import arguments
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.model import (
    InstanceStatus,
    LeaseStatus,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    WaiterStatus,
)
from agentperf_redis.balancer.operations import MAX_EVENTS
from agentperf_redis.cli.console import (
    Exit,
    NotFound,
    Target,
    WrongUsage,
    confirmed,
    counted,
    err,
    new_table,
    not_found,
    out,
    print_json,
    print_json_line,
    printable,
    quoted,
)
from agentperf_redis.cli.options import Yes, group, on_server
from agentperf_redis.cli.status import pools_table
from agentperf_redis.views.reasons import Reason, has_reasons, reasons_of

app = group("Show pools, their leases, queues and events; drain, rest, remove, release and repair.")

_POLL_S = 0.25
"""Interval between two polls for events."""

PoolName = Annotated[str, typer.Argument(help="Agent type of the pool.", metavar="POOL")]
InstanceName = Annotated[str, typer.Argument(help="Name of the instance.", metavar="INSTANCE")]


@app.command()
@on_server
def status(
    target: Target,
    pool: Annotated[str | None, typer.Argument(help="Only the pool of this agent type.", metavar="[POOL]")] = None,
) -> Exit | None:
    """Show pools: strategy, load of the instances, number of waiters.

    overdue: expired leases, which the next request to the pool clears. panic s: how long the pool has been in panic
    mode, s; in panic mode, unhealthy instances get work too. peak: the highest number of leases that an instance has
    had at once. Of each instance that takes no work, the reason is shown, and the time since then.
    """
    if pool is None:
        with target.connect() as perf:
            pools = perf.balancer().status()
            reasons = _reasons(perf.balancer(), pools)
    else:
        with in_pool(target, pool) as lb:
            pools = lb.status(pool)
            reasons = _reasons(lb, pools)
    if target.as_json:
        print_json("lb status", {"pools": [_plain_pool(each, reasons) for each in pools]})
        return None
    if not pools:
        target.nothing("No instance is registered." if pool is None else f"No instance is registered in pool {pool}.")
        return None
    table = new_table(
        "pools", ["pool", "strategy"], ["instances", "healthy", "load", "waiting", "granted", "overdue", "panic s"]
    )
    for each in pools:
        table.add_row(
            each.agent_type,
            each.strategy.value,
            str(len(each.instances)),
            str(each.healthy),
            f"{each.current_load}/{each.total_capacity}",
            str(each.waiting),
            str(each.granted),
            str(each.overdue),
            "" if each.panic_for is None else f"{each.panic_for:.0f}",
        )
    out.print(table)
    out.print()
    divided = [f"{each.agent_type} has {each.shards} shards" for each in pools if each.shards > 1]
    if divided:
        out.print(f"{', '.join(divided)}.")
        out.print()
    instances = pools_table(pools)
    instances.title = "instances"
    out.print(instances)
    if reasons:
        out.print()
        out.print(_reasons_table(reasons.values()))
    return None


@app.command()
@on_server
def events(
    target: Target,
    pool: PoolName,
    limit: Annotated[int, typer.Option("--limit", help="Number of past events to begin with.", metavar="N")] = 20,
    once: Annotated[bool, typer.Option("--once", help="Print past events and exit; do not follow.")] = False,
) -> None:
    """Follow the events of a pool: registrations, ejections, probes, panic, expiries, drains.

    With --json, each event is one line of JSON. With --json and --once, all events are in one JSON document.
    """
    with in_pool(target, pool) as lb:
        found = lb.events(pool, limit=limit)
        if once and target.as_json:
            print_json("lb events", {"pool": pool, "events": [_plain_event(each) for each in found]})
            return
        after = "0-0"
        while True:
            for each in found:
                if target.as_json:
                    print_json_line("lb event", {"pool": pool, **_plain_event(each)})
                else:
                    out.print(_event_line(each))
            out.file.flush()
            if once:
                return
            if found:
                after = found[-1].cursor
            else:
                time.sleep(_POLL_S)
            found = lb.events(pool, after=after)


@app.command()
@on_server
def leases(
    target: Target,
    pool: PoolName,
) -> None:
    """Show the leases of a pool with their holders and ages, and its waiters. `release` takes the tokens."""
    with in_pool(target, pool) as lb:
        found = lb.leases(pool)
        if target.as_json:
            plain = {
                "leases": [_plain_lease(each) for each in found.leases],
                "waiters": [_plain_waiter(each) for each in found.waiters],
            }
            print_json("lb leases", {"pool": pool, **plain})
            return
        if not (found.leases or found.waiters):
            err.print(f"Pool {pool} has no leases and no waiters.")
        if found.leases:
            table = new_table("leases", ["instance", "holder", "token"], ["held s", "ends in s", "fence"])
            table.columns[2].overflow = "fold"  # a token must stay whole, so that it can be copied
            for each in found.leases:
                holder = each.process if each.fetched else f"{each.process} (not fetched yet)"
                times = (f"{each.held_for:.1f}", f"{each.expires_in:.1f}")
                table.add_row(each.instance_id, holder, each.token, *times, str(each.fence))
            out.print(table)
        if found.waiters:
            table = new_table("queue", ["process", "requires", "token"], ["waited s"])
            table.columns[2].overflow = "fold"
            for one in found.waiters:
                table.add_row(one.process, ", ".join(sorted(one.require)), one.token, f"{one.waited:.1f}")
            out.print(table)


@app.command()
@on_server
def drain(
    target: Target,
    pool: PoolName,
    instance: InstanceName,
    wait: Annotated[
        float | None,
        typer.Option("--wait", help="Wait this long for its last lease to end; inf: no limit.", metavar="SECONDS"),
    ] = None,
) -> Exit | None:
    """Stop new work on an instance; its leases run on. With --wait, exit 1 if it is not idle in time."""
    with in_pool(target, pool) as lb:
        limit = 0.0 if wait is None else arguments.seconds("--wait", wait, minimum=0.0, endless=True)
        if not lb.drain(pool, instance):
            return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}")
        if wait is not None and limit > 0 and not target.as_json:
            until = "" if limit == math.inf else f" for at most {limit:g} s"
            err.print(f"{instance} takes no new work; waiting{until} until it is idle.")
        idle = lb.wait_until_idle(pool, instance, wait=limit)
        if target.as_json:
            print_json("lb drain", {"pool": pool, "instance": instance, "draining": True, "idle": idle})
        else:
            state = "idle: it can be stopped" if idle else "still busy"
            out.print(f"{instance} of {pool} takes no new work and is {state}.")
        return Exit.FAILURE if wait is not None and not idle else None


@app.command()
@on_server
def undrain(target: Target, pool: PoolName, instance: InstanceName) -> Exit | None:
    """Put a drained instance back into rotation."""
    with in_pool(target, pool) as lb:
        done = lb.undrain(pool, instance)
        return changed(target, "lb undrain", (pool, instance), done, {"draining": False}, "is no longer draining")


@app.command("mark-unhealthy")
@on_server
def mark_unhealthy(target: Target, pool: PoolName, instance: InstanceName) -> Exit | None:
    """Stop new work on an instance until it is marked healthy; its leases run on."""
    with in_pool(target, pool) as lb:
        done, says = lb.mark_unhealthy(pool, instance), "takes no new work until it is marked healthy"
        return changed(target, "lb mark-unhealthy", (pool, instance), done, {"healthy": False}, says)


@app.command("mark-healthy")
@on_server
def mark_healthy(target: Target, pool: PoolName, instance: InstanceName) -> Exit | None:
    """Let an instance take work again. Ends an ejection, and clears failed checks, a missed heartbeat, a slow start."""
    with in_pool(target, pool) as lb:
        done = lb.mark_healthy(pool, instance)
        return changed(target, "lb mark-healthy", (pool, instance), done, {"healthy": True}, "is marked healthy")


def changed(
    target: Target, command: str, of: tuple[str, str], done: bool, state: dict[str, bool], says: str
) -> Exit | None:
    """Report a change of an instance. `of` is its pool and name. `done` is False if the instance does not exist."""
    pool, instance = of
    if not done:
        return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}")
    if target.as_json:
        print_json(command, {"pool": pool, "instance": instance, **state})
    else:
        out.print(f"{instance} of {pool} {says}.")
    return None


@app.command()
@on_server
def update(
    target: Target,
    pool: PoolName,
    instance: InstanceName,
    capacity: Annotated[
        int | None, typer.Option("--capacity", help="Maximum concurrent leases, at least 1.", metavar="N")
    ] = None,
    weight: Annotated[
        float | None, typer.Option("--weight", help="Share of the picks under WEIGHTED, 0 to 1000000.", metavar="SHARE")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", help="A label; give it once for each label. '' removes all.", metavar="NAME"),
    ] = None,
    requests: Annotated[
        float | None,
        typer.Option("--requests-per-minute", help="Maximum leases per minute; inf: no limit.", metavar="N"),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option("--tokens-per-minute", help="Maximum tokens per minute; inf: no limit.", metavar="N"),
    ] = None,
) -> Exit | None:
    """Change an instance; what is not given stays. A program that registers the instance again undoes the change.

    If the capacity becomes lower than the load, the leases stay valid.
    """
    given = (capacity, weight, labels or None, requests, tokens)
    if all(each is None for each in given):
        raise WrongUsage(
            "give at least one of --capacity, --weight, --label, --requests-per-minute, --tokens-per-minute"
        )
    with in_pool(target, pool) as lb:
        known = lb.update_instance(
            pool,
            instance,
            max_capacity=capacity,
            weight=weight,
            labels=None if not labels else [each for each in labels if each],
            requests_per_minute=requests,
            tokens_per_minute=tokens,
        )
        found = instance_in(lb, pool, instance) if known else None
        if found is None:
            return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}")
        if target.as_json:
            print_json("lb update", {"pool": pool, **_plain_instance(found)})
        else:
            changed = found.instance
            limits = "".join(
                f", {rate:g} {name} per minute"
                for name, rate in (("requests", found.requests_per_minute), ("tokens", found.tokens_per_minute))
                if rate != math.inf
            )
            out.print(
                f"{instance} of {pool}: capacity {changed.max_capacity}, weight {changed.weight:g}, "
                f"labels {', '.join(sorted(changed.labels)) or 'none'}{limits}."
            )
        return None


@app.command()
@on_server
def remove(
    target: Target,
    pool: PoolName,
    instance: InstanceName,
    yes: Yes = False,
) -> Exit | None:
    """Remove an instance from its pool. Its leases run on. A program that registers the instance again adds it back."""
    with in_pool(target, pool) as lb:
        found = instance_in(lb, pool, instance)
        if found is None:
            return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}")
        load = counted(found.instance.current_load, "lease")
        refused = confirmed(f"Remove {instance}, which holds {load}, from {pool}?", yes=yes)
        if refused is not None:
            return refused
        if not lb.remove_instance(pool, instance):
            return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}: it was just removed")
        if target.as_json:
            print_json("lb remove", {"pool": pool, "instance": instance, "removed": True})
        else:
            out.print(f"Removed {instance} from {pool}; its leases run on until they are released.")
        return None


@app.command()
@on_server
def release(
    target: Target,
    pool: PoolName,
    token: Annotated[str, typer.Argument(help="Token, as `agentperf lb leases` shows it.", metavar="TOKEN")],
    yes: Yes = False,
) -> Exit | None:
    """End a lease of any process. Its holder sees the lease as lost, but may still be working.

    The token of a waiter removes the waiter from the queue. If its program still runs, the waiter joins the queue again
    at its old position.
    """
    with in_pool(target, pool) as lb:
        subject = _described(lb.leases(pool), token)
        if subject is None:
            return not_found(f"token {quoted(token)} in pool {quoted(pool)}")
        refused = confirmed(f"End {subject}?", yes=yes)
        if refused is not None:
            return refused
        freed = lb.release_token(pool, token)
        if target.as_json:
            print_json("lb release", {"pool": pool, "token": token, "freed": freed})
        else:
            out.print(f"Ended {subject}; " + ("its capacity is free." if freed else "it held no capacity."))
        return None


@app.command()
@on_server
def repair(
    target: Target,
    pool: PoolName,
) -> None:
    """Recompute the loads of a pool from its leases after a manual change. The pool may stay in use."""
    with in_pool(target, pool) as lb:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("instances", total=None)
            found = lb.repair(pool, progress=lambda done, total: bar.update(task, completed=done, total=total))
        if target.as_json:
            counts = {"instances": found.instances, "wrong": found.wrong, "orphans": found.orphans}
            print_json("lb repair", {"pool": pool, **counts})
        else:
            repaired = [f"corrected the load of {found.wrong}"] if found.wrong else []
            if found.orphans:
                dropped = counted(found.orphans, "orphaned lease or queue entry", "orphaned leases or queue entries")
                repaired.append(f"dropped {dropped} that nothing else would ever have ended")
            done = ", ".join(repaired) or "nothing to repair"
            out.print(f"Checked {counted(found.instances, 'instance')} of {pool}: {done}.")


@contextlib.contextmanager
def in_pool(target: Target, pool: str) -> Iterator[LoadBalancer]:
    """Yield a balancer for a pool that has been used before.

    Raises:
        NotFound: the pool was never used.
    """
    arguments.name("POOL", pool)
    with target.connect() as perf:
        lb = perf.balancer()
        # The events of a pool without instances are kept for a minute, although the pool is no longer listed.
        if pool not in perf.backend.run(perf.backend.entered("lb")) and not lb.events(pool, limit=1):
            raise NotFound(f"pool {quoted(pool)}")
        yield lb


def instance_in(lb: LoadBalancer, pool: str, name: str) -> InstanceStatus | None:
    """Return the status of an instance; None if the pool does not have it."""
    instances = (each for found in lb.status(pool) for each in found.instances)
    return next((each for each in instances if each.instance.id == name), None)


def _described(found: PoolLeases, token: str) -> str | None:
    """Return a description of the lease or waiter with this token; None if there is neither."""
    for lease in found.leases:
        if lease.token == token:
            return f"the lease of {lease.process} on {lease.instance_id}, held for {lease.held_for:.1f} s"
    for waiter in found.waiters:
        if waiter.token == token:
            return f"the queue entry of {waiter.process}, waiting for {waiter.waited:.1f} s"
    return None


def _reasons(lb: LoadBalancer, pools: Iterable[PoolStatus]) -> dict[tuple[str, str], Reason]:
    """Return the reasons, by pool and instance, for all instances that take no work or only one lease at a time."""
    return {
        (pool.agent_type, name): reason
        for pool in pools
        if has_reasons(pool)
        for name, reason in reasons_of(pool, lb.events(pool.agent_type, limit=MAX_EVENTS)).items()
    }


def _reasons_table(reasons: Iterable[Reason]) -> Table:
    table = new_table("out of rotation", ["pool", "instance", "since"], ["ends in s"], ["why"])
    for each in reasons:
        since = "unknown" if each.since is None else f"{datetime.fromtimestamp(each.since).astimezone():%m-%d %H:%M:%S}"
        ends_in = "" if each.ends_in is None else f"{each.ends_in:.0f}"
        table.add_row(each.pool, each.instance, since, ends_in, each.text)
    return table


def _event_line(event: PoolEvent) -> str:
    at = f"{datetime.fromtimestamp(event.at).astimezone():%Y-%m-%d %H:%M:%S.%f}"[:-3]
    details = " ".join(f"{name}={value}" for name, value in event.details.items())
    return printable(f"{at}  {event.kind.value:<17} {event.instance_id or '':<20} {details}".rstrip())


def _plain_event(event: PoolEvent) -> dict[str, Any]:
    return {
        "at": event.at,
        "event": event.kind.value,
        "instance": event.instance_id,
        "details": event.details,
        "cursor": event.cursor,
    }


def _plain_pool(pool: PoolStatus, reasons: Mapping[tuple[str, str], Reason]) -> dict[str, Any]:
    return {
        "pool": pool.agent_type,
        "strategy": pool.strategy.value,
        "shards": pool.shards,
        "load": pool.current_load,
        "capacity": pool.total_capacity,
        "waiting": pool.waiting,
        "granted": pool.granted,
        "overdue": pool.overdue,
        "panic_s": pool.panic_for,
        "settings": None if pool.settings is None else asdict(pool.settings),
        "instances": [
            {**_plain_instance(each), **_plain_reason(reasons.get((pool.agent_type, each.instance.id)))}
            for each in pool.instances
        ],
    }


def _plain_instance(status: InstanceStatus) -> dict[str, Any]:
    instance = status.instance
    return {
        "instance": instance.id,
        "load": instance.current_load,
        "capacity": instance.max_capacity,
        "weight": instance.weight,
        "healthy": instance.is_healthy,
        "draining": instance.is_draining,
        "labels": sorted(instance.labels),
        "response_time_ms": instance.response_time_ms,
        "peak_load": status.peak_load,
        "served": status.served,
        "failed": status.failed,
        "failed_in_a_row": status.failed_in_a_row,
        "fence": status.fence,
        "state": status.state.value,
        "limit": status.limit,
        "ejections": status.ejections,
        "ejected_s": status.ejected_for,
        "resting_s": status.resting_for,
        "requests_per_minute": _finite(status.requests_per_minute),
        "tokens_per_minute": _finite(status.tokens_per_minute),
    }


def _plain_reason(reason: Reason | None) -> dict[str, Any]:
    """Return why an instance is out of rotation; the fields are null if it is not."""
    return {
        "out_since": None if reason is None else reason.since,
        "out_reason": None if reason is None else reason.text,
    }


def _finite(rate: float) -> float | None:
    """Return a rate limit for JSON: None, which becomes null, if the rate is unlimited."""
    return None if rate == math.inf else rate


def _plain_lease(lease: LeaseStatus) -> dict[str, Any]:
    return {
        "token": lease.token,
        "instance": lease.instance_id,
        "process": lease.process,
        "fence": lease.fence,
        "held_s": lease.held_for,
        "ends_in_s": lease.expires_in,
        "fetched": lease.fetched,
    }


def _plain_waiter(waiter: WaiterStatus) -> dict[str, Any]:
    return {
        "token": waiter.token,
        "process": waiter.process,
        "waited_s": waiter.waited,
        "require": sorted(waiter.require),
    }
