"""A flight is one computation in this process. Other callers may join it."""

from __future__ import annotations

import asyncio

import pytest

from agentperf_redis.cache.process import flights as module
from agentperf_redis.cache.process.flights import Computed, Flight, Flights, GivenUp


def test_only_one_flight_runs_at_a_time() -> None:
    flights = Flights()
    first, requests_before = flights.join("k")
    assert requests_before is None, "this call began the flight"
    flights.note_request(first)
    assert flights.join("k") == (first, 1)
    flights.detach("k")
    second, requests_before = flights.join("k")
    assert second is not first
    assert requests_before is None
    flights.end(first, Computed(b"m"))
    flights.end(first, GivenUp())
    assert first.outcome == Computed(b"m"), "callers that had joined get the first outcome"
    assert flights.join("k") == (second, 0), "the end of a detached flight does not affect the next flight"
    flights.detach_all()
    assert flights.join("k")[1] is None


async def joined(flights: Flights) -> Flight:
    flight, requests_before = flights.join("key")
    assert requests_before is None
    return flight


def test_flight_of_a_stopped_loop_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    flights = Flights()
    with asyncio.Runner() as runner:
        stopped = runner.run(joined(flights))
        assert stopped.stands_still
        assert not flights.end_if_stuck(stopped), "the loop may soon run again"
        assert flights.join("key")[0] is stopped
        monkeypatch.setattr(module, "STUCK_S", 0.0)
        following, requests_before = flights.join("key")
    assert (stopped.outcome, requests_before) == (GivenUp(), None)
    assert following is not stopped


def test_flight_of_a_running_loop_or_a_thread_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STUCK_S", 0.0)
    of_a_thread, of_a_task = Flights(), Flights()
    flight, _ = of_a_thread.join("key")
    assert not of_a_thread.end_if_stuck(flight)

    async def main() -> bool:
        return of_a_task.end_if_stuck(await joined(of_a_task))

    assert asyncio.run(main()) is False
