"""`agentperf lb rest` and `agentperf lb delete-pool`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated

import typer

from agentperf_redis.balancer.model import checked_rest
from agentperf_redis.cli.balancer import InstanceName, PoolName, in_pool, instance_in
from agentperf_redis.cli.console import Exit, Target, confirmed, counted, not_found, out, print_json, quoted
from agentperf_redis.cli.options import Yes, on_server
from agentperf_redis.cli.times import parsed_window
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.windows import window_seconds


@on_server
def rest(
    target: Target,
    pool: PoolName,
    instance: InstanceName,
    length: Annotated[str, typer.Option("--for", help="Length: 20s, 5m, 1h, or seconds; at most 1d.", metavar="TIME")],
) -> Exit | None:
    """Let an instance rest, as after a 429: it takes no new work for a time; its leases run on.

    If it already rests for longer, that rest stays. `mark-healthy` ends a rest.
    """
    seconds = _seconds("--for", length)
    with in_pool(target, pool) as lb:
        known = lb.cool_down(pool, instance, seconds)
        found = instance_in(lb, pool, instance) if known else None
        if found is None:
            return not_found(f"instance {quoted(instance)} in pool {quoted(pool)}")
        if target.as_json:
            print_json("lb rest", {"pool": pool, "instance": instance, "resting_s": found.resting_for})
        else:
            until = datetime.fromtimestamp(time.time() + found.resting_for).astimezone()
            out.print(
                f"{instance} of {pool} takes no new work until {until:%m-%d %H:%M:%S}, {found.resting_for:.0f} s."
            )
        return None


@on_server
def delete_pool(target: Target, pool: PoolName, yes: Yes = False) -> Exit | None:
    """Delete a pool at once: its instances, leases, queue, settings, events and history.

    Holders see their leases as lost, but may still be working. Waiters queue on until their time is over. Programs that
    registered the instances do not register them again, unless they could not reach the server for a minute.
    """
    with in_pool(target, pool) as lb:
        held = sum(each.current_load for each in lb.status(pool))
        size = sum(len(each.instances) for each in lb.status(pool))
        subject = f"pool {pool} with {counted(size, 'instance')} and {counted(held, 'lease')}"
        refused = confirmed(f"Delete {subject}?", yes=yes)
        if refused is not None:
            return refused
        deleted = lb.delete_pool(pool)
        if not deleted:
            return not_found(f"pool {quoted(pool)}: it was just deleted")
        if target.as_json:
            print_json("lb delete-pool", {"pool": pool, "deleted": True, "instances": size, "leases": held})
        else:
            out.print(f"Deleted {subject}.")
        return None


def _seconds(option: str, text: str) -> float:
    """Convert the length of a rest from the command line.

    Raises:
        InvalidArgument: the text is no length, or the rest would be too long or too short.
    """
    length = parsed_window(text)
    try:
        return checked_rest(option, length if isinstance(length, float) else window_seconds(text))
    except InvalidArgument:
        allowed = 'seconds from 0.001 to 86400, or a text such as "20s", "5m", "1h"'
        raise InvalidArgument(option, text, allowed) from None
