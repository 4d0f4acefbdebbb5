"""Single flight: of all processes, threads and tasks that miss a value, one computes it, the others wait for it.

Within a process they meet in `flights`; among processes whoever computes holds a lease, by the script claim. Waiters
hear of the end over the bus, and look by themselves should it bring no word.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from agentperf_redis import arguments
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.commands.claims import Await, Failed, Hit
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.flows.access_reports import flush_if_possible
from agentperf_redis.cache.flows.reads import MISSING, Reader
from agentperf_redis.cache.flows.settings import ready
from agentperf_redis.cache.flows.writes import Writer
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Age, Freshness
from agentperf_redis.cache.model import WithoutServer
from agentperf_redis.cache.process.compute_lease import Answer, ComputeLease, Served
from agentperf_redis.cache.process.flights import (
    Computed,
    Crashed,
    Flight,
    FlightOutcome,
    GivenUp,
    Uncacheable,
    Unreachable,
)
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow, Wait
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    ComputeFailed,
    InvalidArgument,
    SchemaMismatch,
    shown,
)

DEFAULT_LEASE_S: Final = 5.0
"""How long a dead process keeps others from computing; the living renew three times as often."""
MIN_LEASE_S: Final = 0.1
"""A renewal must have time to arrive, also from a busy process."""
ERROR_KEPT_MS: Final = 5000
"""How long waiters have to learn of an error; they are told at once, and ask every 0.25 s at the latest."""
_FIRST_LOOK_S, _MAX_LOOK_S = 0.02, 0.25
"""How often a waiter looks by itself, should the bus bring no word."""
_MAX_WAIT_S = 3600.0
_MAX_ERROR_CHARACTERS = 500
_COMPUTE_ANYWAY = (ComputeFailed, InvalidArgument, SchemaMismatch)
"""Errors that are no trouble of the cache: they reach whoever wanted a value."""


class SingleFlight:
    """Computations of one cache object.

    Args:
        reader: reads, of the same object.
        writer: puts what was computed, of the same object.
        lease_ms: how long a dead process keeps others from computing.
        on_unavailable: what becomes of who wants a value while the server is away.
    """

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        lease_ms: int,
        on_unavailable: WithoutServer = WithoutServer.COMPUTE,
    ) -> None:
        self.shared: SharedState = reader.shared
        self.reader = reader
        self.writer = writer
        self.lease_ms = lease_ms
        self.on_unavailable = on_unavailable

    def value_or_lease(
        self, key: str, freshness: Freshness = UNTIL_EXPIRY, *, look: bool = True, blocking: bool = False
    ) -> Flow[Answer | Crashed]:
        """Return the value of a key, or the turn to compute it, which must end with `land`, `crash` or `give_up`.

        Waits for whoever computes it already, in this process or another. What the function raised for another thread
        or task of this process is returned as it is, since it may be a StopIteration.

        Args:
            key: the key.
            freshness: what to do with a value that is no longer fresh.
            look: False computes anew although there is a value.
            blocking: the calling thread does nothing else while it waits.

        Raises:
            ComputeFailed: another process computed, and failed.
            BackendUnavailable: the server does not answer, and that is to be an error.
        """
        name, counts = stored_name(key), look
        try:
            if look:
                refusable = freshness.error_ms is not None  # only then the read may yet turn out to be a miss
                value, stored = yield from self.reader.look_up(name, key, miss=False, hit=not refusable)
                if value is not MISSING:
                    served: Served | None = Served(value)
                    if stored is not None and freshness.concerns(stored):
                        served = yield from self._served_by_age(name, value, stored, freshness)
                    if served is not None:
                        if refusable:
                            yield from self._note_hit(name, 0 if stored is None else stored.cost_ms)
                        return served
                    look = False
            answer: Answer | Crashed | None = None
            try:
                answer = yield from self._join_or_claim(name, key, look=look, blocking=blocking)
            finally:  # what another computes for us is a hit, the one that saves most
                if counts:
                    if isinstance(answer, Served):
                        self.shared.access_buffer.read(name, answer.saved_ms)
                    else:
                        self.shared.access_buffer.missed()
            if isinstance(answer, Served) and self.reader.strict:
                yield from flush_if_possible(self.shared)
        except _COMPUTE_ANYWAY:
            raise
        except BackendUnavailable as error:
            if self.on_unavailable is WithoutServer.RAISE:
                raise
            self._complain(error)
        except AgentPerfError as error:
            self._complain(error)
            return self._lease_without_claim(name, key)
        else:
            return answer
        return (yield from self._without_server(name, key, freshness, look=look, blocking=blocking))

    def _note_hit(self, name: str, saved_ms: int) -> Flow[None]:
        self.shared.access_buffer.read(name, saved_ms)
        if self.reader.strict:
            yield from flush_if_possible(self.shared)

    def _without_server(
        self, name: str, key: str, freshness: Freshness, *, look: bool, blocking: bool = False
    ) -> Flow[Answer | Crashed]:
        """A copy that may stand in, the turn to compute, or what another thread or task of this process brings."""
        local, flights = self.reader.local, self.shared.flights
        copy = local.serve_stale(key, freshness.serve_stale_s) if look and local is not None else None
        if copy is not None and freshness.age(copy, self.shared.server_ms()) is not Age.OLD:
            value = copy.value if copy.frozen else self.reader.unpacked(copy)
            if value is not MISSING:
                self.shared.access_buffer.read(name, copy.cost_ms)
                return Served(value)
        while True:
            if flights.waits_for_itself(name, blocking=blocking):
                return self._lease_without_claim(name, key)
            flight, asked = flights.join(name)
            if asked is None:
                return ComputeLease(self.shared, name, key, "", self.lease_ms, flight)
            while not (yield from Wait(flight.ended, _MAX_WAIT_S)):
                pass
            match flight.outcome:
                case Computed(data, cost_ms):
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Crashed() as crashed:
                    return crashed
                case Uncacheable():
                    return self._lease_without_claim(name, key)

    def _complain(self, error: AgentPerfError) -> None:
        self.shared.complain("cache %s: computing without it: %s", self.shared.name, error)

    def _served_by_age(
        self, name: str, value: Any, stored: entry_format.Stored, freshness: Freshness
    ) -> Flow[Served | None]:
        """Serve a value by its age; None if it is too old to stand in for one that cannot be computed."""
        try:
            yield from ready(self.shared)  # to know the server's clock
        except BackendUnavailable:  # just now; the value is at hand
            return Served(value)
        age = freshness.age(stored, self.shared.server_ms())
        if age is Age.FRESH:
            return Served(value)
        if age is Age.OLD and (yield from commands.computing_failed(self.shared.keys, name)):
            return None
        return Served(value, stale=stored.version)

    def refresh_lease(self, key: str, stale: int, freshness: Freshness) -> Flow[ComputeLease | None]:
        """Return the turn to compute a value anew while the old one is served, or None if it is not for this process.

        Nobody else may be at it, in this process or another, nor may anybody have failed just now.

        Args:
            key: the key.
            stale: version of the value that is served.
            freshness: how long after a failure nobody tries again.
        """
        shared, name, token = self.shared, stored_name(key), secrets.token_hex(8)
        flight, asked = shared.flights.join(name)
        if asked is not None:
            return None
        compute_lease = None
        try:
            shared.flights.ask(flight)
            where, retry_ms = shared.keys, freshness.retry_ms
            reply = yield from commands.claim(
                where, name, token, lease_ms=self.lease_ms, ignore=str(stale), retry_ms=retry_ms
            )
            if isinstance(reply, commands.Lead):
                self._look_at_types(name, reply)
                compute_lease = ComputeLease(shared, name, key, token, self.lease_ms, flight)
            return compute_lease
        except BaseException as error:
            yield from self._let_lease_go(error, name, key, token)
            raise
        finally:
            if compute_lease is None:
                shared.flights.end(flight, GivenUp())

    def _lease_without_claim(self, name: str, key: str) -> ComputeLease:
        return ComputeLease(self.shared, name, key, "", self.lease_ms, None)

    def _join_or_claim(self, name: str, key: str, *, look: bool, blocking: bool) -> Flow[Answer | Crashed]:
        flights = self.shared.flights
        while True:
            if flights.waits_for_itself(name, blocking=blocking):
                return self._lease_without_claim(name, key)
            flight, asked = flights.join(name)
            if asked is None:
                try:
                    answer = yield from self._claim(name, key, flight, look=look)
                except GeneratorExit:
                    flights.end(flight, GivenUp())
                    raise
                except BaseException as error:
                    flights.end(flight, _outcome_of(error))
                    raise
                if isinstance(answer, ComputeLease) and answer.flight is None:
                    flights.end(flight, Uncacheable())
                return answer
            while not (yield from Wait(flight.ended, _MAX_WAIT_S)):
                pass
            match flight.outcome:
                case Computed(data, cost_ms) if asked < flight.asked:
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Crashed() as crashed:
                    return crashed
                case Unreachable(unavailable):
                    raise unavailable
                case Uncacheable():
                    return self._lease_without_claim(name, key)
                case _:
                    look = True

    def _claim(self, name: str, key: str, flight: Flight, *, look: bool) -> Flow[Answer]:
        """Become the one who computes among all processes, or wait for what the one brings."""
        shared = self.shared
        token, ignore, awaited, look_again_s = secrets.token_hex(8), "", "", _FIRST_LOOK_S
        wake_up = None
        if not look:
            entry, _ = yield commands.read(shared.keys, name)
            ignore = entry_format.version_text(entry)
        try:
            while True:
                if wake_up is not None:
                    wake_up.reset()
                shared.flights.ask(flight)
                reply = yield from commands.claim(
                    shared.keys, name, token, lease_ms=self.lease_ms, ignore=ignore, awaited=awaited
                )
                match reply:
                    case commands.Lead():
                        self._look_at_types(name, reply)
                        return ComputeLease(shared, name, key, token, self.lease_ms, flight)
                    case Hit(found):
                        value, stored = yield from self.reader.value(name, found, counted=False)
                        if value is not MISSING and stored is not None:
                            shared.flights.end(flight, Computed(stored.data, stored.cost_ms))
                            return Served(value, stored.cost_ms)
                        ignore = entry_format.version_text(found[0])
                    case Await(left_ms, held):
                        if wake_up is None:
                            wake_up = shared.wake_up_for(name)
                        awaited = held
                        pause = min(look_again_s * random.uniform(0.8, 1.2), left_ms / 1000 + 0.005)
                        look_again_s = min(_MAX_LOOK_S, look_again_s * 1.5)
                        yield from Wait(wake_up, pause)
                    case Failed("", _):
                        return self._lease_without_claim(name, key)
                    case Failed(error_type, message):
                        raise ComputeFailed(key, error_type, message)
        except BaseException as error:
            yield from self._let_lease_go(error, name, key, token)
            raise
        finally:
            if wake_up is not None:
                shared.forget_wake_up(name, wake_up)

    def _look_at_types(self, name: str, lead: commands.Lead) -> None:
        if lead.wrong_type:
            self.reader.complain_of_type(name)
            self.shared.access_buffer.found_corrupt()

    def _let_lease_go(self, error: BaseException, name: str, key: str, token: str) -> Flow[None]:
        """After a claim that was interrupted: the lease may have been given all the same; nobody shall wait for it.

        Not where the server does not answer: who calls has waited for a whole deadline already, and the lease ends.
        """
        if not isinstance(error, (GeneratorExit, AgentPerfError)):
            with suppress(AgentPerfError):
                yield from self._release(ComputeLease(self.shared, name, key, token, self.lease_ms, None), None)

    # The flow that is returned tells the server how the turn ended, unless the turn has no token. An error is for those
    # who wait in this process at once; a value when the server has taken it, since it may be out of date by now.

    def land(
        self,
        compute_lease: ComputeLease,
        value: Any,
        cost_s: float,
        ttl: float | None,
        tags: Iterable[str],
        freshness: Freshness = UNTIL_EXPIRY,
    ) -> tuple[bool, Flow[None]]:
        """End a turn with a value. Returns whether it is one that can be stored, and what is left to do."""
        try:
            data = self.reader.codec.encode(value)
        except InvalidArgument:
            self._end(compute_lease, Uncacheable())
            return False, self._release(compute_lease, " ")
        if not compute_lease.token:  # of which the server knows nothing
            self._end(compute_lease, Computed(data, round(cost_s * 1000)))
        return True, self._store(compute_lease, data, cost_s, ttl, tags, freshness)

    def crash(self, compute_lease: ComputeLease, error: Exception) -> Flow[None]:
        """End a turn with an error: all who wait for it get it. Returns what is left to do."""
        self._end(compute_lease, Crashed(error))
        text = str(error)[:_MAX_ERROR_CHARACTERS].encode(errors="replace").decode()
        return self._release(compute_lease, f"{type(error).__name__} {text}")

    def give_up(self, compute_lease: ComputeLease) -> Flow[None]:
        """End a turn without a result: whoever waits may try. Returns what is left to do."""
        self._end(compute_lease, GivenUp())
        return self._release(compute_lease, None)

    def let_go(self, compute_lease: ComputeLease) -> None:
        """Make sure that nobody in this process waits for a turn any more. Changes nothing if it ended in order."""
        self._end(compute_lease, Uncacheable())

    def _end(self, compute_lease: ComputeLease, outcome: FlightOutcome) -> None:
        if compute_lease.flight is not None:
            self.shared.flights.end(compute_lease.flight, outcome)

    def _store(
        self,
        compute_lease: ComputeLease,
        data: bytes,
        cost_s: float,
        ttl: float | None,
        tags: Iterable[str],
        freshness: Freshness,
    ) -> Flow[None]:
        cost_ms = max(0, min(round(cost_s * 1000), arguments.MAX_COUNT))
        chosen_ttl, names = self.writer.chosen_ttl(ttl), stored_tags(tags)
        if freshness.jitter and not freshness.soft_ms:
            chosen_ttl = self.writer.spread(chosen_ttl, freshness)
        fresh_ms = freshness.spread(freshness.soft_ms)
        if compute_lease.flight is not None:
            self.shared.flights.ask(compute_lease.flight)
        try:
            outcome = yield from self.writer.store(
                compute_lease.name,
                data,
                chosen_ttl,
                names,
                None,
                token=compute_lease.token,
                cost_ms=cost_ms,
                fresh_ms=fresh_ms,
            )
        except (BackendUnavailable, GeneratorExit):
            raise
        except BaseException:  # also where the server is full or spoilt: nobody should wait for the lease to end
            yield from self._release(compute_lease, None)
            raise
        vouched = outcome in (PutResult.STORED, PutResult.TOO_LARGE, PutResult.NO_CAPACITY)
        self._end(compute_lease, Computed(data, cost_ms) if vouched else GivenUp())
        if outcome is PutResult.LATE:
            yield from self._release(compute_lease, None)
        if outcome is PutResult.TOO_LARGE:
            self.shared.complain("cache %s: %s is larger than the cache", self.shared.name, shown(compute_lease.key))

    def _release(self, compute_lease: ComputeLease, error: str | None) -> Flow[None]:
        where, origin = self.shared.keys, self.shared.origin
        yield from commands.release(
            where, compute_lease.name, compute_lease.token, error=error, error_ms=ERROR_KEPT_MS, origin=origin
        )


def _outcome_of(error: BaseException) -> FlightOutcome:
    """Return what others who wait make of an error met while claiming."""
    if isinstance(error, ComputeFailed):
        return Crashed(error)
    if isinstance(error, BackendUnavailable):
        return Unreachable(error)
    # with the cache in trouble they would meet the same, one after the other
    return Uncacheable() if isinstance(error, AgentPerfError) else GivenUp()
