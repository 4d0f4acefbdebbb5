"""The computations of a process that others may join."""

from __future__ import annotations

from agentperf_redis.cache.process.flights import Computed, Flights, GivenUp


def test_one_flight_at_a_time() -> None:
    flights = Flights()
    first, asked = flights.join("k")
    assert asked is None, "begun by this call"
    flights.note_request(first)
    assert flights.join("k") == (first, 1)
    flights.detach("k")
    second, asked = flights.join("k")
    assert second is not first
    assert asked is None
    flights.end(first, Computed(b"m"))
    flights.end(first, GivenUp())
    assert first.outcome == Computed(b"m"), "who had joined it is told, once"
    assert flights.join("k") == (second, 0), "the end of a detached flight leaves the next one alone"
    flights.detach_all()
    assert flights.join("k")[1] is None
