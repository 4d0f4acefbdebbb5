"""Flights. A flight is the one computation of a key in this process; other threads and tasks join it and wait for it.

No caller may get a value that was invalidated before the caller's own call. When this process invalidates a key, the
key's flight is removed from the map of flights at once, and later callers begin another flight. Invalidations by other
processes are known only to the server. Two kinds of requests show whether a value is still valid: the claim of the
compute lease, and the put of the computed value. They are called confirming requests. The result of a flight is shared
only with callers that joined before the last confirming request was sent. A caller that joined later looks for the
value once more. While the server is unreachable, no request confirms a value. A result is then shared only with callers
that have found the server unreachable themselves.

A caller that would wait for itself computes directly (re-entrancy), since waiting would deadlock. There are two such
callers. One is a function that needs the very value it computes. The other is a blocking call on the thread of an event
loop while a task of this loop computes the value.

An event loop that computes a value may stop in the middle, perhaps for good: `run_until_complete` stops its loop at the
end of each call. Once the loop has stood still for `STUCK_S`, another caller may compute the value.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from agentperf_redis.command import WakeUp, running_loop
from agentperf_redis.errors import BackendUnavailable

STUCK_S: Final = 5.0
"""If an event loop that computes a value has been stopped for this many seconds, another caller may compute the value.
The time equals the default TTL of a compute lease."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The computation returned a value. Every waiter decodes its own copy of `data`; the computation took `cost_ms`."""

    data: bytes
    cost_ms: int = 0


@dataclass(frozen=True, slots=True)
class Crashed:
    """The computation raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Unstorable:
    """The computation returned a value that cannot be stored. All waiters get the value itself, not a copy of it."""

    value: Any


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """There is no value that callers could share, so every caller computes its own value."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The server does not answer: every caller looks for a value without the server."""

    error: BackendUnavailable


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The computing caller was cancelled, so another caller may compute the value."""


FlightOutcome: TypeAlias = Computed | Unstorable | Crashed | Uncacheable | Unreachable | GivenUp


class Flight:
    """One computation in progress in this process."""

    __slots__ = ("_loop", "ended", "name", "open", "outcome", "owner", "requests", "still_since", "thread")

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner
        self.name = name
        self.thread = threading.get_ident()
        loop = running_loop()
        self._loop = None if loop is None else weakref.ref(loop)
        self.requests = 0
        """Number of confirming requests sent so far."""
        self.open = True
        self.ended = WakeUp()
        self.outcome: FlightOutcome = GivenUp()
        self.still_since = math.inf
        """When `stands_still` was first found to be true, by `time.monotonic`; infinity if the loop is not known to
        stand still."""

    @property
    def stands_still(self) -> bool:
        """Whether the value is computed by a task whose event loop does not run now: it was stopped or closed."""
        if self._loop is None:
            return False
        loop = self._loop()
        return loop is None or not loop.is_running()


_enclosing: ContextVar[tuple[Flight, ...]] = ContextVar("agentperf_flights", default=())
"""The flights whose functions have called the running code. New tasks and `asyncio.to_thread` inherit this value."""


def enter(flight: Flight | None) -> tuple[Flight, ...]:
    """Record that the function of a flight is about to be called. Returns the argument of `leave`."""
    enclosing = _enclosing.get()
    if flight is not None:
        _enclosing.set((*enclosing, flight))
    return enclosing


def leave(enclosing: tuple[Flight, ...]) -> None:
    """Record that the function of the flight has returned.

    This function does not use the token of `ContextVar.set`. The token is valid only in the context in which the
    coroutine started, but the coroutine may be closed in another context.
    """
    _enclosing.set(enclosing)


class Flights:
    """The computations in progress in this process, by stored name."""

    def __init__(self) -> None:
        self.start_empty()

    def start_empty(self) -> None:
        """Start without flights. Also called in a forked child, since the computing threads stay in the parent."""
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._owner = object()  # new in a forked child, because the child takes no part in the parent's computations

    def join(self, name: str) -> tuple[Flight, int | None]:
        """Return the flight of a key, and the number of its confirming requests so far.

        If this call began the flight, the number is None, and the caller must end the flight. The module's docstring
        explains confirming requests, and with which callers a result is shared.
        """
        existing = self._flights.get(name)
        if existing is not None and existing.stands_still:
            self.end_if_stuck(existing)
        with self._lock:
            flight = self._flights.get(name)
            if flight is not None:
                return flight, flight.requests
            flight = self._flights[name] = Flight(self._owner, name)
            return flight, None

    def end_if_stuck(self, flight: Flight) -> bool:
        """End a flight if its event loop has stood still for `STUCK_S`. Return whether the flight has ended."""
        now = time.monotonic()
        flight.still_since = min(flight.still_since, now) if flight.stands_still else math.inf
        if now - flight.still_since >= STUCK_S:
            self.end(flight, GivenUp())
        return not flight.open

    def waits_for_itself(self, name: str, *, blocking: bool) -> bool:
        """Return whether a caller that waits for a key now would block the computation of this key.

        Args:
            name: stored name of the key.
            blocking: whether the calling thread is blocked while it waits.
        """
        if any(flight.open and flight.name == name and flight.owner is self._owner for flight in _enclosing.get()):
            return True
        flight = self._flights.get(name) if blocking else None
        return flight is not None and flight.thread == threading.get_ident()

    def note_request(self, flight: Flight) -> None:
        """Record that a confirming request is about to be sent."""
        with self._lock:
            flight.requests += 1

    def detach(self, name: str) -> None:
        """Let no further callers join the flight of an invalidated key. Callers that have joined get its result."""
        with self._lock:
            self._flights.pop(name, None)

    def detach_all(self) -> None:
        """Let no further callers join any flight in progress."""
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
