"""What is stored of instances, leases and places in line, decoded; the legend is in pool.lua."""

from __future__ import annotations

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.replies import text_of
from agentperf_redis.balancer.model import Facts, InstanceStatus, LeaseStatus, WaiterStatus, snapshot
from agentperf_redis.command import Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import decoded, encoded

_RECORD_FIELDS = 14
_NO_LABELS: frozenset[str] = frozenset()


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
            b"u" not in flags and b"s" not in flags,
            int(ewma_us) / 1000,
            _NO_LABELS if labels == b"-" else labels_of(labels.decode()),
            b"d" in flags,
        )
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None


def instance_status(pool: Pool, name: Reply, record: Reply) -> InstanceStatus:
    """Decode an instance record with what was counted."""
    instance = snapshot(facts_of(pool, name, record))
    fields = record.split(b" ")
    try:
        fence, peak = map(int, fields[3:5])
        served, failed, fails = map(int, fields[11:_RECORD_FIELDS])
    except ValueError:
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None
    return InstanceStatus(instance, peak, served, failed, fails, fence)


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
            case ["W", place, _, labels]:
                waited = max(0.0, now_ms / 1000 - int(place) / 1e6)
                return WaiterStatus(name, process, waited, labels_of(labels))
            case _:
                return None
    except ValueError:
        raise CorruptState(pool.keys.state, f"the lease record {shown(record)}") from None
