"""One computation at a time of each key within this process; other threads and tasks wait for what it brings.

Nobody may be handed a value that was invalidated before he asked. What this process invalidates takes the flight off
the map at once, so who comes later begins another. Of what other processes invalidate only the server knows: it vouches
for a value by answering a question, a claim or the put of what was computed, and only for those who had joined before
that question was sent. Who joined later looks again. While the server is away nobody vouches, and what lands is only
for those who found that out, too.

Who would wait for himself computes by himself: a function that asks for the very value it computes, and a blocking call
on the thread of an event loop whose tasks compute it. Either would wait for ever.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

from agentperf_redis.command import WakeUp
from agentperf_redis.errors import BackendUnavailable


@dataclass(frozen=True, slots=True)
class Computed:
    """The computation brought a value: its bytes, from which everyone makes a copy of his own, and what it cost."""

    data: bytes
    cost_ms: int = 0


@dataclass(frozen=True, slots=True)
class Crashed:
    """The computation raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """The computation brought a value that cannot be stored: everyone computes his own."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The server does not answer: everyone looks for a value without it."""

    error: BackendUnavailable


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Whoever computed was cancelled: another may try."""


FlightOutcome: TypeAlias = Computed | Crashed | Uncacheable | Unreachable | GivenUp


class Flight:
    """One computation under way in this process."""

    __slots__ = ("asked", "ended", "life", "name", "open", "outcome", "thread")

    def __init__(self, life: object, name: str) -> None:
        self.life = life
        self.name = name
        self.thread = threading.get_ident()
        self.asked = 0
        """Questions whose answer would vouch for the value, sent so far."""
        self.open = True
        self.ended = WakeUp()
        self.outcome: FlightOutcome = GivenUp()


_around: ContextVar[tuple[Flight, ...]] = ContextVar("agentperf_flights", default=())
"""The flights whose functions called what runs now: also in tasks they started, and in `asyncio.to_thread`."""


def enter(flight: Flight | None) -> tuple[Flight, ...]:
    """Note that the function of a flight is about to be called. Returns what `leave` wants."""
    around = _around.get()
    if flight is not None:
        _around.set((*around, flight))
    return around


def leave(around: tuple[Flight, ...]) -> None:
    """Note that the function has returned. No token: a coroutine may be closed in another context than it began in."""
    _around.set(around)


class Flights:
    """The computations under way in this process, by stored name."""

    def __init__(self) -> None:
        self.start_empty()

    def start_empty(self) -> None:
        """Begin anew: also what a forked child does, since it has none of the threads that compute."""
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._life = object()  # a child forked by a function does not compute for that function

    def join(self, name: str) -> tuple[Flight, int | None]:
        """Return the flight of a key, and how often it had asked; None if it was begun by this call, which must end it.

        A value it lands is for who joined when it had asked less often than at the end.
        """
        with self._lock:
            flight = self._flights.get(name)
            if flight is not None:
                return flight, flight.asked
            flight = self._flights[name] = Flight(self._life, name)
            return flight, None

    def waits_for_itself(self, name: str, *, blocking: bool) -> bool:
        """Return whether whoever waits for a key now keeps it from being computed.

        Args:
            name: stored name of the key.
            blocking: the calling thread does nothing else while it waits.
        """
        if any(flight.open and flight.name == name and flight.life is self._life for flight in _around.get()):
            return True
        flight = self._flights.get(name) if blocking else None
        return flight is not None and flight.thread == threading.get_ident()

    def ask(self, flight: Flight) -> None:
        """Note that the server is about to be asked for something that vouches for the value."""
        with self._lock:
            flight.asked += 1

    def detach(self, name: str) -> None:
        """Let nobody join a flight any more: its key was invalidated. Who has joined still gets what it brings."""
        with self._lock:
            self._flights.pop(name, None)

    def detach_all(self) -> None:
        """Let nobody join the flights that are under way."""
        with self._lock:
            self._flights.clear()

    def end(self, flight: Flight, outcome: FlightOutcome) -> None:
        """End a flight. A second call changes nothing."""
        with self._lock:
            if not flight.open:
                return
            flight.open = False
            if self._flights.get(flight.name) is flight:
                del self._flights[flight.name]
            flight.outcome = outcome
        flight.ended.send()
