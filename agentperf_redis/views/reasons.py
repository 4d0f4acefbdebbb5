"""Why an instance takes no work, and since when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agentperf_redis.balancer.model import EventKind, InstanceState, InstanceStatus, PoolEvent, PoolStatus


@dataclass(frozen=True, slots=True)
class Reason:
    """The reason why an instance takes no work.

    Attributes:
        pool: the pool of the instance.
        instance: the instance.
        state: its state.
        since: when the state began, in s since 1970 by the server's clock; None if unknown. It is unknown for a rate
            limit, which has no event. It is also unknown if the pool has dropped the event: a pool stores only about
            its last thousand events.
        ends_in: seconds until an ejection or a resting period ends; None for other states.
        text: the reason in words.
    """

    pool: str
    instance: str
    state: InstanceState
    since: float | None
    ends_in: float | None
    text: str


_CAUSES = {
    InstanceState.DRAINING: (EventKind.DRAINING, "draining: marked by hand or by its program (`agentperf lb undrain`)"),
    InstanceState.UNHEALTHY: (
        EventKind.UNHEALTHY,
        "marked unhealthy by hand or by its program (`agentperf lb mark-healthy`)",
    ),
    InstanceState.HEARTBEAT_MISSED: (EventKind.HEARTBEAT_MISSED, "its heartbeat did not arrive in time"),
    InstanceState.DOWN: (EventKind.DOWN, "it fails its active checks"),
    InstanceState.EJECTED: (EventKind.EJECTED, "ejected for its outcomes"),
    InstanceState.RESTING: (EventKind.RESTING, "resting: rate-limited by its service, or cooled down"),
    InstanceState.HALF_OPEN: (EventKind.HALF_OPEN, "its ejection is over; one lease at a time until one succeeds"),
    InstanceState.RATE_LIMITED: (None, "its requests or tokens per minute are used up for now"),
}
"""State -> the event that begins it, and the reason in words."""


def has_reasons(pool: PoolStatus) -> bool:
    """Whether any instance of a pool takes no work, or only one lease at a time."""
    return any(each.state in _CAUSES for each in pool.instances)


def reasons_of(pool: PoolStatus, events: Iterable[PoolEvent] = ()) -> dict[str, Reason]:
    """Return the reason for each instance of a pool that takes no work, or only one lease at a time, by instance id.

    Args:
        pool: the pool.
        events: its events, oldest first. Without them, `since` of each reason is None.
    """
    latest = {(each.instance_id, each.kind): each for each in events}
    return {each.instance.id: _reason(pool, each, latest) for each in pool.instances if each.state in _CAUSES}


def _reason(pool: PoolStatus, status: InstanceStatus, latest: dict[tuple[str | None, EventKind], PoolEvent]) -> Reason:
    name = status.instance.id
    kind, text = _CAUSES[status.state]
    event = None if kind is None else latest.get((name, kind))
    if event is not None and event.kind in (EventKind.EJECTED, EventKind.RESTING):
        text += "".join(f", {field}={value}" for field, value in event.details.items())
    ends = {InstanceState.EJECTED: status.ejected_for, InstanceState.RESTING: status.resting_for}
    return Reason(
        pool.agent_type,
        name,
        status.state,
        None if event is None else event.at,
        ends.get(status.state),
        text,
    )
