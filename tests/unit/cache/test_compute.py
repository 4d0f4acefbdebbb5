"""The flow that computes a value, driven with `send()`: the order of steps, however the function or the put ends."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest

from agentperf_redis.cache import LRUCache, compute
from agentperf_redis.cache.commands.claims import Lead
from agentperf_redis.cache.commands.entries import PutReply, PutResult
from agentperf_redis.cache.compute import Wanted, accepted, computing
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.process.compute_lease import Served
from agentperf_redis.cache.process.flights import Computed, Crashed, GivenUp, Uncacheable, Unstorable
from agentperf_redis.command import Call, Command, Flow, Shielded
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.script import Script
from tests.support.renewed import Renewed

AWAY = BackendUnavailable("somewhere", "unknown", "down")


class Computation:
    """One run of the flow, paused before its next step."""

    def __init__(
        self, cache: LRUCache, renewed: Renewed, function: Callable[[], object] = int, *, blocking: bool = True
    ) -> None:
        self.renewed = renewed
        self.wanted = Wanted[Any]("k", function)
        maintenance = cast("Maintenance", renewed)
        self.flow = computing(cache._flows, maintenance, self.wanted, None, look=True, blocking=blocking)
        self.flights = cache._shared_state.flights

    def called(self) -> None:
        """Advance to the call of the function, under a lease."""
        assert self.sends(next(self.flow)) == "MGET"
        assert self.sends(self.flow.send([None, None])) == "cache/claim"
        self.flight = self.flights._flights["k"]
        step = self.flow.send(Lead(1))
        assert step == Call(self.wanted.function)
        assert [compute_lease.flight for compute_lease in self.renewed.compute_leases] == [self.flight]

    @staticmethod
    def sends(step: object) -> str:
        """Return the name of the script or the command of a step."""
        assert isinstance(step, Command)
        return step.script.name if isinstance(step.script, Script) else step.script


def shielded(step: object) -> Flow[None]:
    assert isinstance(step, Shielded)
    return step.flow


def end(flow: Flow[Any], answer: object = None) -> Any:
    """Send the last answer to a flow; return the flow's result."""
    with pytest.raises(StopIteration) as done:
        flow.send(answer)
    return done.value.value


def test_value_is_stored_before_the_flow_ends(deployed: LRUCache, renewed: Renewed) -> None:
    run = Computation(deployed, renewed)
    run.called()

    storing = shielded(run.flow.send(5))

    assert run.sends(next(storing)) == "cache/put"
    assert run.flight.open, "other callers get the value only after the server has stored it"
    end(storing, PutReply(PutResult.STORED, 7))
    assert isinstance(run.flight.outcome, Computed)
    assert not run.renewed.compute_leases
    assert accepted(run.wanted, end(run.flow)) == 5


@pytest.mark.parametrize(
    "error", [KeyError("no such thing"), StopIteration(5), AWAY], ids=lambda error: type(error).__name__
)
def test_function_error_is_reported_and_returned_unchanged(
    deployed: LRUCache, renewed: Renewed, error: Exception
) -> None:
    run = Computation(deployed, renewed)
    run.called()

    telling = shielded(run.flow.throw(error))

    assert run.flight.outcome == Crashed(error), "other callers of this process get the error at once"
    assert not run.renewed.compute_leases
    assert run.sends(next(telling)) == "cache/release_claim"
    end(telling)
    with pytest.raises(type(error)) as raised:
        accepted(run.wanted, end(run.flow))
    assert raised.value is error


def test_cancelled_function_releases_its_lease(deployed: LRUCache, renewed: Renewed) -> None:
    run = Computation(deployed, renewed)
    run.called()

    telling = shielded(run.flow.throw(asyncio.CancelledError()))

    assert (run.flight.open, run.flight.outcome) == (False, GivenUp())
    assert not run.renewed.compute_leases
    assert run.sends(next(telling)) == "cache/release_claim"
    end(telling)
    with pytest.raises(asyncio.CancelledError):
        run.flow.send(None)


@pytest.mark.parametrize("end_of_put", ["server away", "loop ends", "collected"])
def test_cancellation_while_storing_leaves_the_shielded_flow(
    deployed: LRUCache, renewed: Renewed, end_of_put: str
) -> None:
    run = Computation(deployed, renewed)
    run.called()
    storing = shielded(run.flow.send(5))
    assert run.sends(next(storing)) == "cache/put"

    with pytest.raises(asyncio.CancelledError):
        run.flow.throw(asyncio.CancelledError())

    assert run.renewed.compute_leases, "the put is still in flight, under its lease"
    if end_of_put == "server away":
        with pytest.raises(StopIteration):
            storing.throw(AWAY)
    elif end_of_put == "loop ends":
        assert run.sends(storing.throw(asyncio.CancelledError())) == "cache/release_claim"
        with pytest.raises(asyncio.CancelledError):
            storing.send(None)
    else:
        storing.close()
    assert not run.renewed.compute_leases
    assert (run.flight.open, run.flight.outcome) == (False, Uncacheable())


def test_flow_closed_during_function_sends_nothing(deployed: LRUCache, renewed: Renewed) -> None:
    run = Computation(deployed, renewed)
    run.called()
    run.flow.close()
    assert (run.flight.open, run.flight.outcome) == (False, GivenUp())
    assert not run.renewed.compute_leases


@pytest.mark.parametrize("blocking", [True, False])
def test_unstorable_value_is_returned_and_reported(
    deployed: LRUCache, renewed: Renewed, blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Computation(deployed, renewed, blocking=blocking)
    run.called()
    value = object()

    telling = shielded(run.flow.send(value))

    assert run.sends(next(telling)) == "cache/release_claim"
    assert run.flight.open, "other callers get the value only after the server has confirmed that it is valid"
    end(telling, True)
    assert run.flight.outcome == Unstorable(value)
    answer = end(run.flow)
    assert isinstance(answer, Served)
    assert (answer.value, answer.refused is None) == (value, False)
    monkeypatch.setattr(compute, "_warned", {})
    with pytest.warns(
        RuntimeWarning, match=r"int returned a value that cannot be stored.* value is a builtins\.object;"
    ):
        assert accepted(run.wanted, answer) is value


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(object(), GivenUp()), (iter([]), Uncacheable()), ((x for x in "a"), Uncacheable())],
    ids=["invalidated", "iterator", "generator"],
)
def test_unstorable_value_is_not_always_shared(
    deployed: LRUCache, renewed: Renewed, value: object, outcome: object
) -> None:
    """The value may have been invalidated during the computation, or its first reader may use it up."""
    run = Computation(deployed, renewed)
    run.called()
    telling = shielded(run.flow.send(value))
    next(telling)
    end(telling, False)
    assert run.flight.outcome == outcome
    assert end(run.flow).value is value


def test_coroutine_of_blocking_call_is_closed_and_refused(deployed: LRUCache, renewed: Renewed) -> None:
    async def later() -> int:
        raise AssertionError("it never runs")

    run = Computation(deployed, renewed, later)
    run.called()
    made = later()

    telling = shielded(run.flow.send(made))
    next(telling)
    end(telling)

    with pytest.raises(InvalidArgument, match=r"under \.aio"):
        accepted(run.wanted, end(run.flow))
    assert inspect.getcoroutinestate(made) == inspect.CORO_CLOSED
