"""One computation at a time of each key within this process; other threads and tasks wait for what it brings."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TypeAlias

from agentperf_redis.command import Hint


@dataclass(frozen=True, slots=True)
class Landed:
    """The computation brought a value: its bytes, from which everyone makes a copy of his own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Crashed:
    """The computation raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """The computation brought a value that cannot be stored: everyone computes his own."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Whoever computed was cancelled: another may try."""


Outcome: TypeAlias = Landed | Crashed | Uncacheable | GivenUp


class Flight:
    """One computation under way in this process."""

    __slots__ = ("ended", "name", "outcome")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = Hint()
        self.outcome: Outcome = GivenUp()


class Flights:
    """The computations under way in this process, by stored name."""

    def __init__(self) -> None:
        self.start_empty()

    def start_empty(self) -> None:
        """Begin anew: also what a forked child does, since it has none of the threads that compute."""
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}

    def join(self, name: str) -> tuple[Flight, bool]:
        """Return the flight of a key, and whether it was begun by this call, which must then end it."""
        with self._lock:
            flight = self._flights.get(name)
            if flight is not None:
                return flight, False
            flight = self._flights[name] = Flight(name)
            return flight, True

    def end(self, flight: Flight, outcome: Outcome) -> None:
        """End a flight. A second call changes nothing."""
        with self._lock:
            if self._flights.get(flight.name) is not flight:
                return
            del self._flights[flight.name]
            flight.outcome = outcome
        flight.ended.give()
