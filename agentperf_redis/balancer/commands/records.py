"""What is stored of instances, leases and places in line, decoded; the legend is in pool.lua."""

from __future__ import annotations

import math

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.replies import text_of
from agentperf_redis.balancer.model import Facts, InstanceState, InstanceStatus, LeaseStatus, WaiterStatus, snapshot
from agentperf_redis.command import Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import decoded, encoded

_RECORD_FIELDS = 14
_MORE_FIELDS = 13
_NO_LABELS: frozenset[str] = frozenset()
_ILL = frozenset(b"usec")
"""Flags of an instance that takes no work because of its health."""
_STATES = (
    (b"d", InstanceState.DRAINING),
    (b"u", InstanceState.UNHEALTHY),
    (b"s", InstanceState.SILENT),
    (b"c", InstanceState.DOWN),
    (b"e", InstanceState.EJECTED),
    (b"h", InstanceState.PROBING),
    (b"p", InstanceState.PARKED),
    (b"w", InstanceState.WARMING),
)
"""What to call an instance with several flags: the first."""


def packed_labels(labels: frozenset[str]) -> str:
    """Return labels as the scripts take them: encoded, sorted, ``a,b``; ``-`` for none."""
    if not labels:
        return "-"
    return ",".join(sorted("%2D" if label == "-" else encoded(label) for label in labels))


def labels_of(text: str) -> frozenset[str]:
    """Return what `packed_labels` packed."""
    return _NO_LABELS if text == "-" else frozenset(map(decoded, text.split(",")))


def facts_of(pool: Pool, name: Reply, record: Reply) -> Facts:
    """Decode an instance record; its fields are in the legend of pool.lua."""
    try:
        fields = record.split(b" ")
        load, _lim, _seq, _fence, _peak, weight, labels, flags, cap, ewma_us = fields[:10]
        if len(fields) < _RECORD_FIELDS:
            raise ValueError(len(fields))
        return (
            decoded(name.decode()),
            pool.agent_type,
            int(load),
            int(cap),
            float(weight),
            flags == b"-" or _ILL.isdisjoint(flags),
            int(ewma_us) / 1000,
            _NO_LABELS if labels == b"-" else labels_of(labels.decode()),
            b"d" in flags,
        )
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None


def instance_status(pool: Pool, now_ms: int, name: Reply, record: Reply, more: Reply) -> InstanceStatus:
    """Decode an instance record with what was counted, and with what only few instances have."""
    instance = snapshot(facts_of(pool, name, record))
    fields = record.split(b" ")
    requests = tokens = math.inf
    ejections, until_ms = 0, 0
    try:
        limit, fence, peak = int(fields[1]), int(fields[3]), int(fields[4])
        served, failed, fails = map(int, fields[11:_RECORD_FIELDS])
        flags = fields[7]
        if more:
            others = more.split(b" ")
            if len(others) < _MORE_FIELDS:
                raise ValueError(len(others))
            ejections, until_ms = int(others[0]), int(others[1])
            requests, tokens = (float(rate) or math.inf for rate in others[9:11])
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)} {shown(more)}") from None
    return InstanceStatus(
        instance,
        peak,
        served,
        failed,
        fails,
        fence,
        state=next((state for flag, state in _STATES if flag in flags), InstanceState.UP),
        limit=limit,
        ejections=ejections,
        ejected_for=max(0.0, (until_ms - now_ms) / 1000) if b"e" in flags else 0.0,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )


def holder(pool: Pool, now_ms: int, token: Reply, record: Reply, due_ms: Reply) -> LeaseStatus | WaiterStatus | None:
    """Decode a lease, a grant not fetched yet or a place in line; None for what ended meanwhile."""
    name, ends = text_of(pool, token), text_of(pool, due_ms)
    process = name.removeprefix("@").rpartition(":")[0]
    try:
        left = (float(ends) - now_ms) / 1000
        match text_of(pool, record).split(" "):
            case ["L" | "G" as kind, instance, fence, _]:
                return LeaseStatus(
                    token=name,
                    instance_id=decoded(instance),
                    process=process,
                    fence=int(fence),
                    held_for=max(0.0, now_ms / 1000 - int(fence) / 1e6),
                    expires_in=left,
                    fetched=kind == "L",
                )
            case ["W", place, _, labels, _]:
                waited = max(0.0, now_ms / 1000 - int(place) / 1e6)
                return WaiterStatus(name, process, waited, labels_of(labels))
            case _:
                return None
    except ValueError:
        raise CorruptState(pool.keys.state, f"the lease record {shown(record)}") from None
