"""Flights: computations of a process that other callers may join."""

from __future__ import annotations

from agentperf_redis.cache.process.flights import Computed, Flights, GivenUp


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
