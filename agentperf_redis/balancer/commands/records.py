"""Decodes the records of instances, leases and waiters; pool.lua describes their fields."""

from __future__ import annotations

import math
import re

from agentperf_redis.arguments import MAX_COUNT
from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.replies import text_of
from agentperf_redis.balancer.model import (
    MAX_WEIGHT,
    Facts,
    InstanceState,
    InstanceStatus,
    LeaseStatus,
    WaiterStatus,
    snapshot,
)
from agentperf_redis.command import Reply, whole_number
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import decoded, encoded

_RECORD = re.compile(
    rb"load=(\d+) limit=(\d+) seq=\d+ fence=(\d+) peak=(\d+) ewma_us=(\d+) ewma_at_ms=\d+ served=(\d+) failed=(\d+) "
    rb"streak=(\d+) weight=(\d+\.?\d*) labels=(\S+) flags=(\S+) cap=(\d+)(?: |$)"
)
"""Matches an instance record whose fields are in the order in which the scripts write them.

One pattern is faster than a split into fields, and every `acquire` decodes a record.
"""
_NAMES = (
    *("load", "limit", "seq", "fence", "peak", "ewma_us", "ewma_at_ms"),
    *("served", "failed", "streak", "weight", "labels", "flags", "cap"),
)
_MAX_LEFT_S = 1e9
"""Maximum time until a lease expires, s. It exceeds every TTL, so a stored expiry that is later must be damaged."""
_NO_LABELS: frozenset[str] = frozenset()
_UNHEALTHY_FLAGS = frozenset((b"unhealthy", b"heartbeat_missed", b"ejected", b"down"))
"""The flags with which an instance is reported as not healthy."""
_STATES = tuple((state.value.encode(), state) for state in InstanceState if state is not InstanceState.UP)
"""Flags and their states. When an instance has several flags, the first one in this order is its state."""


def fields_of(record: str) -> dict[str, str]:
    """Return the fields of a record by name. pool.lua lists the kinds of records.

    Raises:
        ValueError: for a word that is not "name=value".
    """
    words = record.split(" ")
    if "=" not in words[0]:  # the first word is the kind of the record, or "-" if there are no fields
        words = words[1:]
    return dict(_field(word) for word in words)


def _field(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not sign:
        raise ValueError(word)
    return name, value


def packed_labels(labels: frozenset[str]) -> str:
    """Return labels in the format of the scripts: encoded, sorted, and joined as ``a,b``; ``-`` for no labels."""
    if not labels:
        return "-"
    return ",".join(sorted("%2D" if label == "-" else encoded(label) for label in labels))


def labels_of(text: str) -> frozenset[str]:
    """Return the labels from the text that `packed_labels` returned."""
    return _NO_LABELS if text == "-" else frozenset(map(decoded, text.split(",")))


def _matched(record: Reply) -> re.Match[bytes]:
    """Match an instance record whose fields may be in any order.

    Raises:
        ValueError: for a record that the scripts did not write.
    """
    found = _RECORD.match(record)
    if found is None:
        fields = fields_of(record.decode())
        found = _RECORD.match(" ".join(f"{name}={fields.get(name, '')}" for name in _NAMES).encode())
        if found is None:
            raise ValueError(record)
    return found


def facts_of(pool: Pool, name: Reply, record: Reply) -> Facts:
    """Decode an instance record."""
    try:
        load, _, _, _, ewma_us, _, _, _, weight, labels, flags, cap = _matched(record).groups()
        return (
            decoded(name.decode()),
            pool.agent_type,
            int(load),
            int(cap),
            float(weight),
            flags == b"-" or _UNHEALTHY_FLAGS.isdisjoint(flags.split(b",")),
            int(ewma_us) / 1000,
            _NO_LABELS if labels == b"-" else labels_of(labels.decode()),
            b"draining" in flags.split(b","),
        )
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None


def instance_status(pool: Pool, now_ms: int, name: Reply, record: Reply, extra: Reply) -> InstanceStatus:
    """Decode an instance record, which includes the counters, and the extra record, which most instances lack."""
    instance = snapshot(facts_of(pool, name, record))
    try:
        _, *texts, _, _, words, _ = _matched(record).groups()
        limit, fence, peak, _, served, failed, streak = map(whole_number, texts)
        flags = words.split(b",")
        more = fields_of(extra.decode()) if extra else {}
        if instance.max_capacity > MAX_COUNT or instance.weight > MAX_WEIGHT:
            raise ValueError(record)
        ejections, until_ms = whole_number(more.get("ejections")), whole_number(more.get("ejected_until_ms"))
        rest_until_ms = whole_number(more.get("rest_until_ms"))
        requests, tokens = (float(more.get(rate, 0)) or math.inf for rate in ("rpm", "tpm"))
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)} {shown(extra)}") from None
    return InstanceStatus(
        instance,
        peak,
        served,
        failed,
        streak,
        fence,
        state=next((state for flag, state in _STATES if flag in flags), InstanceState.UP),
        limit=limit,
        ejections=ejections,
        ejected_for=max(0.0, (until_ms - now_ms) / 1000) if b"ejected" in flags else 0.0,
        resting_for=max(0.0, (rest_until_ms - now_ms) / 1000) if b"resting" in flags else 0.0,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )


def holder(pool: Pool, now_ms: int, token: Reply, record: Reply, due_ms: Reply) -> LeaseStatus | WaiterStatus | None:
    """Decode the record of a lease, of a grant that is not fetched yet, or of a waiter.

    Returns:
        None if the lease, grant or wait has ended meanwhile.
    """
    name, ends = text_of(pool, token), text_of(pool, due_ms)
    text = text_of(pool, record)
    process = name.removeprefix("@").rpartition(":")[0]
    try:
        left = (float(ends) - now_ms) / 1000
        if not abs(left) <= _MAX_LEFT_S:
            raise ValueError(ends)
        match text.partition(" ")[0]:
            case "lease" | "grant" as kind:
                fields = fields_of(text)
                fence = whole_number(fields["fence"])
                return LeaseStatus(
                    token=name,
                    instance_id=decoded(fields["instance"]),
                    process=process,
                    fence=fence,
                    held_for=max(0.0, now_ms / 1000 - fence / 1e6),
                    expires_in=left,
                    fetched=kind == "lease",
                )
            case "waiting":
                fields = fields_of(text)
                ticket = fields["ticket"]
                whole_number(ticket.removeprefix("-"))  # raises for non-digits; a high priority has a negative ticket
                waited = max(0.0, now_ms / 1000 - int(ticket) / 1e6)
                return WaiterStatus(name, process, waited, labels_of(fields["labels"]))
            case _:
                return None
    except (KeyError, ValueError):
        raise CorruptState(pool.keys.state, f"the lease record {shown(record)}") from None
