"""The order of requests when leases are acquired and released, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, Job
from agentperf_redis.balancer import Lease, Outcome, commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.flows import acquiring, acquiring_many, blocks
from agentperf_redis.balancer.flows.queue import queues_of
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.command import Batch, Command, Wait, WakeUp
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    CorruptState,
    InvalidArgument,
    SchemaMismatch,
    ScriptFailed,
)

POOL = Pool.of("n", "t")
RECORD = (
    b"load=1 limit=5 seq=7 fence=1000 peak=3 ewma_us=1500 ewma_at_ms=0 served=4 failed=2 streak=1 "
    b"weight=2.5 labels=fr,gpu flags=- cap=5"
)


class NoThread(Background):
    """A background thread that accepts jobs and never runs them."""

    def put(self, job: Job) -> bool:
        return True

    def at(self, due: float, job: Job) -> bool:
        return True


class SilentKeeper(LeaseKeeper):
    """A lease keeper that only records the commands that it should retry in the background."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.jobs = NoThread("none")
        self.background: list[Any] = []

    def retry_in_background(
        self, command: Command[Any] | Batch[Any], seconds: float, tried: WakeUp | None = None
    ) -> None:
        self.background.append((command, seconds))


@pytest.fixture
def keeper() -> Iterator[SilentKeeper]:
    backend = Backend("redis://127.0.0.1:1/0")
    yield SilentKeeper(backend)
    backend.close()


GRANTED = commands.Granted(commands.facts_of(POOL, b"p0", RECORD), 99, 1000)
UNKNOWN = BackendUnavailable("here", "unknown", "late")


def test_interrupted_acquire_releases_with_a_tombstone(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
    first: Any = flow.send(None)
    second: Any = flow.throw(KeyboardInterrupt())
    assert second.script is commands.RELEASE
    assert second.args["token"] == first.args["token"]
    assert int(second.args["bury_ms"]) >= 90_000
    with pytest.raises(KeyboardInterrupt):
        flow.send(True)
    assert keeper.background == []


def test_cancelled_acquire_waits_briefly_for_its_release(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(ttl=7.0))
    first: Any = flow.send(None)
    waits: Any = flow.throw(asyncio.CancelledError())
    ((command, seconds),) = keeper.background
    assert (command.script, command.args["token"], seconds) == (commands.RELEASE, first.args["token"], 7.0)
    assert int(command.args["bury_ms"]) >= 60_000
    assert isinstance(waits, Wait)
    assert waits.seconds < 0.5
    with pytest.raises(asyncio.CancelledError):
        flow.send(False)


@pytest.mark.parametrize("error", [UNKNOWN, CorruptState("k", "x"), ScriptFailed("balancer/acquire", "ERR broken off")])
def test_acquire_of_unknown_outcome_is_undone_in_background(keeper: SilentKeeper, error: AgentPerfError) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(ttl=7.0))
    first: Any = flow.send(None)
    with pytest.raises(type(error)):
        flow.throw(error)
    ((command, seconds),) = keeper.background
    assert (command.script, command.args["token"], seconds) == (commands.RELEASE, first.args["token"], 7.0)


@pytest.mark.parametrize("error", [BackendUnavailable("here", "not_applied", "no"), SchemaMismatch("k", "2", "1")])
def test_acquire_that_was_not_applied_is_not_undone(keeper: SilentKeeper, error: AgentPerfError) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
    flow.send(None)
    with pytest.raises(type(error)):
        flow.throw(error)
    assert keeper.background == []


def test_unresponsive_node_costs_other_pools_no_leases(keeper: SilentKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    for name in ("gone", "also gone", "well"):
        flow = acquiring.acquire(
            keeper, queues_of(keeper._backend), Pool.of("n", name), acquiring.LeaseRequest(ttl=1.2)
        )
        flow.send(None)
        with pytest.raises(StopIteration) as end:
            flow.send(GRANTED)
        held.append(end.value.value)
    for lease in held:
        lease.renew_at = 0.0
    timeout = []

    def run(command: Command[Any], deadline: float) -> frozenset[str]:
        if "gone" in command.keys[0]:
            timeout.append(deadline)
            time.sleep(deadline)
            raise UNKNOWN
        return frozenset()

    monkeypatch.setattr(keeper._backend, "run", run)
    before = held[2].valid_until
    keeper._renew_due()
    assert all(lease.held for lease in held)
    assert held[2].valid_until > before
    assert len(timeout) == 2
    assert sum(timeout) < 1.2 / 3
    assert [lease.end() for lease in held] == [True] * 3


def test_closed_flow_undoes_its_request(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
    flow.send(None)
    flow.close()
    assert len(keeper.background) == 1


def test_spent_token_is_replaced_by_a_new_one(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
    step: Any = flow.send(None)
    second: Any = flow.send(commands.Spent("expired"))
    assert step.args["token"] != second.args["token"]
    with pytest.raises(StopIteration) as end:
        flow.send(GRANTED)
    lease = end.value.value
    assert isinstance(lease, Lease)
    assert lease.token == second.args["token"]
    assert keeper.held() == [lease]
    assert lease.end()
    assert not lease.end()


REFUSED = commands.Refused(1.0, 2, 0)


def test_waiter_that_gives_up_leaves_the_queue(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(wait=0.001))
    acquire: Any = flow.send(None)
    waited: Any = flow.send(REFUSED)
    assert (waited.script, waited.args["token"], waited.args["ticket"]) == (commands.WAIT, acquire.args["token"], "-")
    time.sleep(0.002)
    left: Any = flow.send(commands.Queued(3, 0.5, "17"))
    assert (left.script, left.args["token"]) == (commands.RELEASE, acquire.args["token"])
    with pytest.raises(StopIteration) as end:
        flow.send(False)
    assert end.value.value == commands.Refused(0.5, 2, 3)


def test_waiter_polls_again_and_keeps_its_position(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(wait=100.0, priority=2))
    flow.send(None)
    flow.send(REFUSED)
    pause: Any = flow.send(commands.Queued(3, 0.5, "17"))
    assert isinstance(pause, Wait)
    assert pause.seconds == 0.5
    again: Any = flow.send(False)
    assert (again.args["boost_ms"], again.args["ticket"]) == (2000, "17")
    spent: Any = flow.send(commands.Spent("expired"))
    assert spent.script is commands.WAIT
    assert spent.args["token"] != again.args["token"]
    with pytest.raises(StopIteration) as end:
        flow.send(GRANTED)
    assert end.value.value.token == spent.args["token"]
    end.value.value.end()


@pytest.mark.parametrize("outcome", ["unknown", "not_applied"])
def test_queue_entry_is_removed_in_background_after_failure(keeper: SilentKeeper, outcome: Any) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(wait=100.0))
    acquire: Any = flow.send(None)
    flow.send(REFUSED)
    with pytest.raises(BackendUnavailable):
        flow.throw(BackendUnavailable("here", outcome, "gone"))
    assert keeper.background[0][0].args["token"] == acquire.args["token"]


def test_unknown_outcome_is_refused_when_set(keeper: SilentKeeper) -> None:
    flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
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
def test_end_of_a_block_decides_its_outcome(keeper: SilentKeeper, error: BaseException | None, outcome: str) -> None:
    for stated, expected in ((None, outcome), ("rejected", "j"), (Outcome.NEUTRAL, "n")):
        flow = acquiring.acquire(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest())
        flow.send(None)
        with pytest.raises(StopIteration) as end:
            flow.send(GRANTED)
        lease = end.value.value
        lease.outcome = stated
        leaving = blocks.leave(keeper, lease, error)
        step: Any = leaving.send(None)
        assert step.args["outcome"] == expected
        assert int(step.args["response_us"]) >= 0
        with pytest.raises(StopIteration):
            leaving.send(True)
        assert not lease.held


def test_interrupted_acquire_many_releases_all_tokens(keeper: SilentKeeper) -> None:
    flow = acquiring_many.acquire_many(keeper, queues_of(keeper._backend), POOL, acquiring.LeaseRequest(), 3, False)
    first: Any = flow.send(None)
    second: Any = flow.throw(KeyboardInterrupt())
    assert isinstance(second, Batch)
    released: list[Any] = [each.args for each in second.commands]
    assert [args["token"] for args in released] == list(first.args["leases..."])
    assert all(args["bury_ms"] >= 90_000 for args in released)


def test_interrupted_fallback_releases_the_first_leases(keeper: SilentKeeper) -> None:
    request = acquiring.LeaseRequest(fallback=(commands.Pool.of("n", "other"),))
    flow = acquiring_many.acquire_many(keeper, queues_of(keeper._backend), POOL, request, 2, False)
    first: Any = flow.send(None)
    token = first.args["leases..."][0]
    second: Any = flow.send({token: GRANTED})
    assert second.keys[0].startswith("n:{lb:other}")
    with pytest.raises(BackendUnavailable):
        flow.throw(UNKNOWN)
    released: list[Any] = [command.args for command, _ in keeper.background if isinstance(command, Command)]
    assert [args["token"] for args in released] == [token]


@pytest.mark.parametrize("tokens", [-1, 1.5, "5", True, 10**400, object()])
def test_invalid_tokens_used_are_refused_at_once(keeper: SilentKeeper, tokens: Any) -> None:
    """If they were accepted, the release would fail, and the unit would stay occupied until the lease expires."""
    lease = Lease(keeper, POOL, "@t", 1, GRANTED.facts, ttl=9.0, sent_at=0.0, max_hold=9.0, on_lost=None)
    with pytest.raises(InvalidArgument, match="tokens_used"):
        lease.tokens_used = tokens
    lease.tokens_used = 5
    assert lease.tokens_used == 5
    lease.tokens_used = None
    lease.end()
