"""The balancer without a server: values, decoders, and the order of steps in its flows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, Lease, LoadBalancingStrategy, Outcome, PoolStatus, commands, flows
from agentperf_redis.balancer.commands import ANY, Choice, Pool
from agentperf_redis.balancer.keeper import Keeper
from agentperf_redis.balancer.model import InstanceStatus
from agentperf_redis.balancer.waiting import lines_of
from agentperf_redis.command import Command, Wait
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    CorruptState,
    InvalidArgument,
    SchemaMismatch,
    ScriptFailed,
)

POOL = Pool.of("n", "t")
RECORD = b"1 5 7 1000 3 2.5 fr,gpu - 5 1500 0 4 2 1"


class SilentKeeper(Keeper):
    """Notes what it is told to do in the background, and does nothing."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.told: list[Any] = []

    def insist(self, command: Command[Any], seconds: float) -> None:
        self.told.append((command, seconds))

    def _start(self) -> None:
        pass


@pytest.fixture
def keeper() -> Iterator[SilentKeeper]:
    backend = Backend("redis://127.0.0.1:1/0")
    yield SilentKeeper(backend)
    backend.close()


REPLIES = st.recursive(
    st.integers() | st.binary(max_size=20) | st.none() | st.sampled_from([RECORD, b"least_loaded", b"p0"]),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=12,
)
COMMANDS: list[Command[Any]] = [
    commands.acquire(POOL, "@t", 1000, ANY),
    commands.acquire(POOL, "@t", 1000, Choice(LoadBalancingStrategy.RANDOM)),
    commands.heartbeat(POOL, ["p0"], 1000),
    commands.register(POOL, AgentInstance("p0", "t"), LoadBalancingStrategy.RANDOM, 0),
    commands.leases(POOL, 0, 10),
    commands.release(POOL, "@t"),
    commands.remove(POOL, "p0"),
    commands.renew(POOL, ["@t"], 1000),
    commands.repair(POOL, 0, 10),
    commands.select(POOL, ANY),
    commands.status(POOL, 0, 10),
    commands.update(POOL, "p0"),
    commands.wait(POOL, "@t", ttl_ms=1, live_ms=1, boost_ms=0, require=frozenset(), place="-"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.script.name)
@given(reply=REPLIES | st.lists(st.integers(-5, 2) | REPLIES, min_size=1, max_size=9))
def test_decoders_answer_every_reply(command: Command[Any], reply: Any) -> None:
    with contextlib.suppress(AgentPerfError):
        command.decode(reply)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.script.name)
@pytest.mark.parametrize("reply", [None, b"", [], [b"1"], [-4, b"p0"], [-9], [1, [b"x"], None], "text"])
def test_an_unexpected_reply_is_corrupt_state(command: Command[Any], reply: Any) -> None:
    with pytest.raises(CorruptState) as caught:
        command.decode(reply)
    assert caught.value.key == POOL.keys.state


def test_a_record_becomes_a_snapshot() -> None:
    status = commands.instance_status(POOL, b"p%201", RECORD)
    labels = frozenset({"gpu", "fr"})
    instance = AgentInstance("p 1", "t", 1, 5, 2.5, True, 1.5, labels=labels)
    assert status == InstanceStatus(instance, peak_load=3, served=4, failed=2, failed_in_a_row=1, fence=1000)


@pytest.mark.parametrize(
    ("flags", "healthy", "draining"),
    [("u", False, False), ("s", False, False), ("d", True, True), ("us", False, False)],
)
def test_flags_become_health(flags: str, healthy: bool, draining: bool) -> None:
    instance = commands.instance_status(POOL, b"p", RECORD.replace(b" - ", f" {flags} ".encode())).instance
    assert (instance.is_healthy, instance.is_draining) == (healthy, draining)


def test_records_of_later_versions_may_be_longer() -> None:
    assert commands.instance_status(POOL, b"p", RECORD + b" 17 x") == commands.instance_status(POOL, b"p", RECORD)


@given(st.frozensets(st.text(st.characters(codec="utf-8", min_codepoint=0x20, max_codepoint=0x2FF), min_size=1)))
def test_labels_survive_their_packing(labels: frozenset[str]) -> None:
    labels = frozenset(label for label in labels if label.isprintable())
    packed = commands.packed_labels(labels)
    assert (packed == "-") == (not labels)
    record = RECORD.replace(b"fr,gpu", packed.encode())
    assert commands.instance_status(POOL, b"p", record).instance.labels == labels


def test_an_affinity_always_has_the_same_point() -> None:
    points = {Choice(affinity="alice").args()[2] for _ in range(5)}
    assert len(points) == 1
    assert Choice(affinity="bob").args()[2] not in points


@pytest.mark.parametrize(
    ("weight", "text"), [(1.0, "1"), (0.0, "0"), (2.5, "2.5"), (1e6, "1000000"), (1e-9, "0.000000001")]
)
def test_weights_are_sent_as_plain_decimals(weight: float, text: str) -> None:
    command = commands.register(POOL, AgentInstance("p", "t", weight=weight), None, 0)
    assert command.args[3] == text


def test_load_is_a_share_of_capacity() -> None:
    instance = AgentInstance("p", "t", current_load=3, max_capacity=4)
    assert (instance.load_percentage, instance.available_capacity) == (75.0, 1)
    over = AgentInstance("p", "t", current_load=5, max_capacity=4)
    assert (over.load_percentage, over.available_capacity) == (125.0, 0)


def test_a_pool_without_instances_renders_as_the_reference_does() -> None:
    status = PoolStatus("t", LoadBalancingStrategy.RANDOM, (), waiting=0, granted=0, overdue=0)
    assert status.render() == {
        "instances": 0,
        "healthy": 0,
        "total_capacity": 0,
        "current_load": 0,
        "load_percentage": "0%",
        "instances_detail": [],
    }


GRANTED = commands.Granted(commands.facts_of(POOL, b"p0", RECORD), 99, 1000)
UNKNOWN = BackendUnavailable("here", "unknown", "late")


def test_an_interrupted_acquire_is_followed_by_a_burying_release(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
    first: Any = flow.send(None)
    second: Any = flow.throw(KeyboardInterrupt())
    assert second.script is commands.RELEASE
    assert second.args[0] == first.args[0]
    assert int(second.args[4]) >= 90_000
    with pytest.raises(KeyboardInterrupt):
        flow.send(True)
    assert keeper.told == []


@pytest.mark.parametrize("error", [UNKNOWN, CorruptState("k", "x"), ScriptFailed("balancer/acquire", "ERR broken off")])
def test_an_acquire_of_unknown_outcome_is_compensated_in_the_background(
    keeper: SilentKeeper, error: AgentPerfError
) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish(ttl=7.0))
    first: Any = flow.send(None)
    with pytest.raises(type(error)):
        flow.throw(error)
    ((command, seconds),) = keeper.told
    assert (command.script, command.args[0], seconds) == (commands.RELEASE, first.args[0], 7.0)


@pytest.mark.parametrize("error", [BackendUnavailable("here", "not_applied", "no"), SchemaMismatch("k", "2", "1")])
def test_an_acquire_that_surely_did_nothing_needs_no_compensation(keeper: SilentKeeper, error: AgentPerfError) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
    flow.send(None)
    with pytest.raises(type(error)):
        flow.throw(error)
    assert keeper.told == []


def test_a_pool_whose_node_is_silent_costs_the_leases_of_others_nothing(
    keeper: SilentKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("gone", "also gone", "well"):
        flow = flows.acquire(keeper, lines_of(keeper._backend), Pool.of("n", name), flows.Wish(ttl=1.2))
        flow.send(None)
        with pytest.raises(StopIteration) as end:
            flow.send(GRANTED)
        held.append(end.value.value)
    for lease in held:
        lease.renew_at = 0.0
    keeper._wake_at = 0.0
    patience = []

    def run(command: Command[Any], deadline: float) -> frozenset[str]:
        if "gone" in command.keys[0]:
            patience.append(deadline)
            time.sleep(deadline)
            raise UNKNOWN
        return frozenset()

    monkeypatch.setattr(keeper._backend, "run", run)
    before = held[2].valid_until
    keeper._renew_due()
    assert all(lease.held for lease in held)
    assert held[2].valid_until > before
    assert len(patience) == 2
    assert sum(patience) < 1.2 / 3
    assert [lease.end() for lease in held] == [True] * 3


def test_a_closed_flow_asks_for_nothing_more(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
    flow.send(None)
    flow.close()
    assert len(keeper.told) == 1


def test_a_spent_token_is_replaced_a_few_times(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
    step: Any = flow.send(None)
    second: Any = flow.send(commands.Spent("e"))
    assert step.args[0] != second.args[0]
    with pytest.raises(StopIteration) as end:
        flow.send(GRANTED)
    lease = end.value.value
    assert isinstance(lease, Lease)
    assert lease.token == second.args[0]
    assert keeper.held() == [lease]
    assert lease.end()
    assert not lease.end()


REFUSED = commands.Refused(1.0, 2, 0)


def test_who_gives_up_waiting_leaves_the_line(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish(wait=0.001))
    asked: Any = flow.send(None)
    waited: Any = flow.send(REFUSED)
    assert (waited.script, waited.args[0], waited.args[5]) == (commands.WAIT, asked.args[0], "-")
    time.sleep(0.002)
    left: Any = flow.send(commands.Queued(3, 0.5, "17"))
    assert (left.script, left.args[0]) == (commands.RELEASE, asked.args[0])
    with pytest.raises(StopIteration) as end:
        flow.send(False)
    assert end.value.value == commands.Refused(0.5, 2, 3)


def test_a_waiter_looks_again_when_something_is_due_and_keeps_its_place(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish(wait=100.0, priority=2))
    flow.send(None)
    flow.send(REFUSED)
    pause: Any = flow.send(commands.Queued(3, 0.5, "17"))
    assert isinstance(pause, Wait)
    assert pause.seconds == 0.5
    again: Any = flow.send(False)
    assert (again.args[3], again.args[5]) == (2000, "17")
    spent: Any = flow.send(commands.Spent("e"))
    assert spent.script is commands.WAIT
    assert spent.args[0] != again.args[0]
    with pytest.raises(StopIteration) as end:
        flow.send(GRANTED)
    assert end.value.value.token == spent.args[0]
    end.value.value.end()


@pytest.mark.parametrize("outcome", ["unknown", "not_applied"])
def test_a_place_in_line_is_given_up_in_the_background_when_the_server_is_gone(
    keeper: SilentKeeper, outcome: Any
) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish(wait=100.0))
    asked: Any = flow.send(None)
    flow.send(REFUSED)
    with pytest.raises(BackendUnavailable):
        flow.throw(BackendUnavailable("here", outcome, "gone"))
    assert keeper.told[0][0].args[0] == asked.args[0]


def test_an_outcome_there_is_not_is_refused_where_it_is_set(keeper: SilentKeeper) -> None:
    flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
    flow.send(None)
    with pytest.raises(StopIteration) as end:
        flow.send(GRANTED)
    lease = end.value.value
    with pytest.raises(InvalidArgument, match="'timeout'"):
        lease.outcome = "splendid"
    lease.outcome = "error"
    assert lease.outcome is Outcome.ERROR
    assert lease.end()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "o"),
        (ValueError(), "e"),
        (TimeoutError(), "t"),
        (KeyboardInterrupt(), "n"),
        (GeneratorExit(), "n"),
    ],
)
def test_how_a_block_ends_is_the_outcome(keeper: SilentKeeper, error: BaseException | None, outcome: str) -> None:
    for stated, expected in ((None, outcome), ("rejected", "j"), (Outcome.NEUTRAL, "n")):
        flow = flows.acquire(keeper, lines_of(keeper._backend), POOL, flows.Wish())
        flow.send(None)
        with pytest.raises(StopIteration) as end:
            flow.send(GRANTED)
        lease = end.value.value
        lease.outcome = stated
        leaving = flows.leave(keeper, lease, error)
        step: Any = leaving.send(None)
        assert step.args[2] == expected
        assert int(step.args[3]) >= 0
        with pytest.raises(StopIteration):
            leaving.send(True)
        assert not lease.held
