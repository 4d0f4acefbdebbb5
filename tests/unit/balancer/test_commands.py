"""The balancer's commands without a server: the arguments that they send, and how they decode replies."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from agentperf_redis.balancer import (
    AgentInstance,
    InstanceState,
    LoadBalancingStrategy,
    PoolSettings,
    commands,
)
from agentperf_redis.balancer.commands import ANY, Choice, Pool
from agentperf_redis.balancer.model import InstanceStatus
from agentperf_redis.command import Command
from agentperf_redis.errors import AgentPerfError, CorruptState, InvalidArgument, SchemaMismatch
from tests.support.examples import examples

POOL = Pool.of("n", "t")
RECORD = (
    b"load=1 limit=5 seq=7 fence=1000 peak=3 ewma_us=1500 ewma_at_ms=0 served=4 failed=2 streak=1 "
    b"weight=2.5 labels=fr,gpu flags=- cap=5"
)
REPLIES = st.recursive(
    st.integers() | st.binary(max_size=20) | st.none() | st.sampled_from([RECORD, b"least_loaded", b"p0"]),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=12,
)
COMMANDS: list[Command[Any]] = [
    commands.acquire(POOL, "@t", 1000, ANY),
    commands.configure(POOL, PoolSettings(), 0, 10),
    commands.claim_checks(POOL, 1000, 8),
    commands.report_checks(POOL, 1, [("p0", True)]),
    commands.acquire(POOL, "@t", 1000, Choice(LoadBalancingStrategy.RANDOM)),
    commands.heartbeat(POOL, ["p0"], 1000),
    commands.register(POOL, AgentInstance("p0", "t"), LoadBalancingStrategy.RANDOM, 0),
    commands.leases_page(POOL, 0, 10),
    commands.release(POOL, "@t"),
    commands.remove(POOL, "p0"),
    commands.renew(POOL, ["@t"], 1000),
    commands.repair(POOL, 0, 10),
    commands.select(POOL, ANY),
    commands.status(POOL, 0, 10),
    commands.update(POOL, "p0"),
    commands.wait(POOL, "@t", ttl_ms=1, live_ms=1, boost_ms=0, require=frozenset(), position="-"),
]


@examples(100, 1500)
def test_decoders_raise_only_library_errors(examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.sampled_from(COMMANDS), REPLIES | st.lists(st.integers(-5, 2) | REPLIES, min_size=1, max_size=9))
    def decode(command: Command[Any], reply: Any) -> None:
        with contextlib.suppress(AgentPerfError):
            command.decode(reply)

    decode()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.script.name)
@pytest.mark.parametrize("reply", [None, b"", [], [b"1"], [-4, b"p0"], [-9], [1, [b"x"], None], "text"])
def test_unexpected_reply_is_corrupt_state(command: Command[Any], reply: Any) -> None:
    with pytest.raises(CorruptState) as caught:
        command.decode(reply)
    assert caught.value.key == POOL.keys.state


@pytest.mark.parametrize("reply", [[0, 0, 0, 0, b""], [0, 0, 0, 0, 0, 0, []], [0, 1, 2, 3], [0] * 8])
def test_malformed_refusal_is_corrupt_state(reply: Any) -> None:
    with pytest.raises(CorruptState):
        commands.acquire(POOL, "@t", 1000, ANY).decode(reply)


def test_instance_record_decodes_to_a_snapshot() -> None:
    status = commands.instance_status(POOL, 0, b"p%201", RECORD, b"")
    labels = frozenset({"gpu", "fr"})
    instance = AgentInstance("p 1", "t", 1, 5, 2.5, True, 1.5, labels=labels)
    assert status == InstanceStatus(instance, peak_load=3, served=4, failed=2, failed_in_a_row=1, fence=1000, limit=5)


def test_extra_record_decodes_into_the_status() -> None:
    record = RECORD.replace(b"flags=-", b"flags=ejected,metered")
    extra = b"ejections=2 ejected_until_ms=3500 rpm=60"
    status = commands.instance_status(POOL, 1000, b"p", record, extra)
    assert status.state is InstanceState.EJECTED
    assert (status.ejections, status.ejected_for) == (2, 2.5)
    assert (status.requests_per_minute, status.tokens_per_minute) == (60, math.inf)


@pytest.mark.parametrize(
    ("flags", "healthy", "draining"),
    [
        ("unhealthy", False, False),
        ("heartbeat_missed", False, False),
        ("draining", True, True),
        ("heartbeat_missed,unhealthy", False, False),
        ("ejected", False, False),
        ("down,metered", False, False),
        ("adaptive,half_open,metered,rate_limited,warming", True, False),
    ],
)
def test_flags_decode_to_health_and_draining(flags: str, healthy: bool, draining: bool) -> None:
    instance = commands.instance_status(
        POOL, 0, b"p", RECORD.replace(b"flags=-", f"flags={flags}".encode()), b""
    ).instance
    assert (instance.is_healthy, instance.is_draining) == (healthy, draining)


def test_records_of_later_versions_may_have_more_fields() -> None:
    longer = commands.instance_status(POOL, 0, b"p", RECORD + b" zone=17 x=-", b"zone=17")
    assert longer == commands.instance_status(POOL, 0, b"p", RECORD, b"")


def test_records_are_decoded_in_any_order() -> None:
    reversed_record = b" ".join(reversed(RECORD.split(b" ")))
    assert commands.instance_status(POOL, 0, b"p", reversed_record, b"") == commands.instance_status(
        POOL, 0, b"p", RECORD, b""
    )


def test_unknown_strategy_is_an_invalid_argument() -> None:
    for command in (commands.acquire(POOL, "@t", 1, ANY), commands.select(POOL, ANY), COMMANDS[6]):
        with pytest.raises(InvalidArgument, match="fastest"):
            command.decode([-7, b"fastest"])


@pytest.mark.parametrize(("fact", "found"), [(b"1 least_loaded", "1"), (b"schema=3 strategy=random", "3")])
def test_other_schema_names_both_versions(fact: bytes, found: str) -> None:
    with pytest.raises(SchemaMismatch) as caught:
        COMMANDS[0].decode([-3, fact])
    assert (caught.value.found, caught.value.needed) == (found, commands.SCHEMA)


@given(st.frozensets(st.text(st.characters(codec="utf-8", min_codepoint=0x20, max_codepoint=0x2FF), min_size=1)))
def test_labels_survive_a_round_trip(labels: frozenset[str]) -> None:
    labels = frozenset(label for label in labels if label.isprintable())
    packed = commands.packed_labels(labels)
    assert (packed == "-") == (not labels)
    record = RECORD.replace(b"fr,gpu", packed.encode())
    assert commands.instance_status(POOL, 0, b"p", record, b"").instance.labels == labels


def test_affinity_always_maps_to_the_same_point() -> None:
    points = {Choice(affinity="alice").args()["point"] for _ in range(5)}
    assert len(points) == 1
    assert Choice(affinity="bob").args()["point"] not in points


@pytest.mark.parametrize(
    ("weight", "text"), [(1.0, "1"), (0.0, "0"), (2.5, "2.5"), (1e6, "1000000"), (1e-9, "0.000000001")]
)
def test_weights_are_sent_as_plain_decimals(weight: float, text: str) -> None:
    command = commands.register(POOL, AgentInstance("p", "t", weight=weight), None, 0)
    assert isinstance(command.args, dict)
    assert command.args["weight"] == text


@pytest.mark.parametrize("reply", [[b"1", []], [b"1", 5], [b"1"], [5, None]])
def test_unexpected_registrations_are_corrupt_state(reply: Any) -> None:
    with pytest.raises(CorruptState):
        commands.find_registered(POOL, ["p0"]).decode(reply)


def test_unreadable_times_are_ignored() -> None:
    assert commands.find_registered(POOL, ["p0"]).decode([b"9" * 5000, None]) == (0, [False])
    fields = [b"kind", b"registered", b"id", b"p0"]
    found = commands.events(POOL, None, 9).decode(
        [[b"1-0\xc7", fields], [b"9" * 5000 + b"-0", fields], [b"5-0", fields]]
    )
    assert [event.at for event in found] == [0.005]
