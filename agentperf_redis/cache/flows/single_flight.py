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
from agentperf_redis.cache.commands.entries import PutOutcome
from agentperf_redis.cache.flows.access_reports import flush_if_room
from agentperf_redis.cache.flows.reads import MISSING, Reader
from agentperf_redis.cache.flows.settings import ready
from agentperf_redis.cache.flows.writes import Writer
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Age, Freshness
from agentperf_redis.cache.model import WithoutServer
from agentperf_redis.cache.process.compute_lease import Answer, Served, Turn
from agentperf_redis.cache.process.flights import Crashed, Flight, GivenUp, Landed, Outcome, Uncacheable, Unreachable
from agentperf_redis.cache.process.shared_state import Binding
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
LEAST_LEASE_S: Final = 0.1
"""A renewal must have time to arrive, also from a busy process."""
ERROR_KEPT_MS: Final = 5000
"""How long waiters have to learn of an error; they are told at once, and ask every 0.25 s at the latest."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.25
"""How often a waiter looks by itself, should the bus bring no word."""
_MOST_WAIT_S = 3600.0
_MOST_ERROR_CHARACTERS = 500
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
        self.binding: Binding = reader.binding
        self.reader = reader
        self.writer = writer
        self.lease_ms = lease_ms
        self.on_unavailable = on_unavailable

    def answer_or_turn(
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
                        served = yield from self._served_as_it_is(name, value, stored, freshness)
                    if served is not None:
                        if refusable:
                            yield from self._note_hit(name, 0 if stored is None else stored.cost_ms)
                        return served
                    look = False
            answer: Answer | Crashed | None = None
            try:
                answer = yield from self._turn(name, key, look=look, blocking=blocking)
            finally:  # what another computes for us is a hit, the one that saves most
                if counts:
                    if isinstance(answer, Served):
                        self.binding.outbox.read(name, answer.saved_ms)
                    else:
                        self.binding.outbox.missed()
            if isinstance(answer, Served) and self.reader.strict:
                yield from flush_if_room(self.binding)
        except _COMPUTE_ANYWAY:
            raise
        except BackendUnavailable as error:
            if self.on_unavailable is WithoutServer.RAISE:
                raise
            self._complain(error)
        except AgentPerfError as error:
            self._complain(error)
            return self._turn_alone(name, key)
        else:
            return answer
        return (yield from self._without_server(name, key, freshness, look=look, blocking=blocking))

    def _note_hit(self, name: str, saved_ms: int) -> Flow[None]:
        self.binding.outbox.read(name, saved_ms)
        if self.reader.strict:
            yield from flush_if_room(self.binding)

    def _without_server(
        self, name: str, key: str, freshness: Freshness, *, look: bool, blocking: bool = False
    ) -> Flow[Answer | Crashed]:
        """A copy that may stand in, the turn to compute, or what another thread or task of this process brings."""
        local, flights = self.reader.local, self.binding.flights
        copy = local.stand_in(key, freshness.stands_in_s) if look and local is not None else None
        if copy is not None and freshness.age(copy, self.binding.server_ms()) is not Age.OLD:
            value = copy.value if copy.frozen else self.reader.unpacked(copy)
            if value is not MISSING:
                self.binding.outbox.read(name, copy.cost_ms)
                return Served(value)
        while True:
            if flights.waits_for_itself(name, blocking=blocking):
                return self._turn_alone(name, key)
            flight, asked = flights.join(name)
            if asked is None:
                return Turn(self.binding, name, key, "", self.lease_ms, flight)
            while not (yield from Wait(flight.ended, _MOST_WAIT_S)):
                pass
            match flight.outcome:
                case Landed(data, cost_ms):
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Crashed() as crashed:
                    return crashed
                case Uncacheable():
                    return self._turn_alone(name, key)

    def _complain(self, error: AgentPerfError) -> None:
        self.binding.complain("cache %s: computing without it: %s", self.binding.name, error)

    def _served_as_it_is(
        self, name: str, value: Any, stored: entry_format.Stored, freshness: Freshness
    ) -> Flow[Served | None]:
        """Serve a value by its age; None if it is too old to stand in for one that cannot be computed."""
        try:
            yield from ready(self.binding)  # to know the server's clock
        except BackendUnavailable:  # just now; the value is at hand
            return Served(value)
        age = freshness.age(stored, self.binding.server_ms())
        if age is Age.FRESH:
            return Served(value)
        if age is Age.OLD and (yield from commands.computing_failed(self.binding.keys, name)):
            return None
        return Served(value, stale=stored.version)

    def turn_to_refresh(self, key: str, stale: int, freshness: Freshness) -> Flow[Turn | None]:
        """Return the turn to compute a value anew while the old one is served, or None if it is not for this process.

        Nobody else may be at it, in this process or another, nor may anybody have failed just now.

        Args:
            key: the key.
            stale: version of the value that is served.
            freshness: how long after a failure nobody tries again.
        """
        binding, name, token = self.binding, stored_name(key), secrets.token_hex(8)
        flight, asked = binding.flights.join(name)
        if asked is not None:
            return None
        turn = None
        try:
            binding.flights.ask(flight)
            where, retry_ms = binding.keys, freshness.retry_ms
            reply = yield from commands.claim(
                where, name, token, lease_ms=self.lease_ms, ignore=str(stale), retry_ms=retry_ms
            )
            if isinstance(reply, commands.Lead):
                self._look_at_types(name, reply)
                turn = Turn(binding, name, key, token, self.lease_ms, flight)
            return turn
        except BaseException as error:
            yield from self._let_lease_go(error, name, key, token)
            raise
        finally:
            if turn is None:
                binding.flights.end(flight, GivenUp())

    def _turn_alone(self, name: str, key: str) -> Turn:
        return Turn(self.binding, name, key, "", self.lease_ms, None)

    def _turn(self, name: str, key: str, *, look: bool, blocking: bool) -> Flow[Answer | Crashed]:
        flights = self.binding.flights
        while True:
            if flights.waits_for_itself(name, blocking=blocking):
                return self._turn_alone(name, key)
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
                if isinstance(answer, Turn) and answer.flight is None:
                    flights.end(flight, Uncacheable())
                return answer
            while not (yield from Wait(flight.ended, _MOST_WAIT_S)):
                pass
            match flight.outcome:
                case Landed(data, cost_ms) if asked < flight.asked:
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Crashed() as crashed:
                    return crashed
                case Unreachable(unavailable):
                    raise unavailable
                case Uncacheable():
                    return self._turn_alone(name, key)
                case _:
                    look = True

    def _claim(self, name: str, key: str, flight: Flight, *, look: bool) -> Flow[Answer]:
        """Become the one who computes among all processes, or wait for what the one brings."""
        binding = self.binding
        token, ignore, awaited, look_again_s = secrets.token_hex(8), "", "", _FIRST_LOOK_S
        hint = None
        if not look:
            entry, _ = yield commands.read(binding.keys, name)
            ignore = entry_format.version_text(entry)
        try:
            while True:
                if hint is not None:
                    hint.reset()
                binding.flights.ask(flight)
                reply = yield from commands.claim(
                    binding.keys, name, token, lease_ms=self.lease_ms, ignore=ignore, awaited=awaited
                )
                match reply:
                    case commands.Lead():
                        self._look_at_types(name, reply)
                        return Turn(binding, name, key, token, self.lease_ms, flight)
                    case Hit(found):
                        value, stored = yield from self.reader.value(name, found, counted=False)
                        if value is not MISSING and stored is not None:
                            binding.flights.end(flight, Landed(stored.data, stored.cost_ms))
                            return Served(value, stored.cost_ms)
                        ignore = entry_format.version_text(found[0])
                    case Await(left_ms, held):
                        if hint is None:
                            hint = binding.hint_for(name)
                        awaited = held
                        pause = min(look_again_s * random.uniform(0.8, 1.2), left_ms / 1000 + 0.005)
                        look_again_s = min(_LONGEST_LOOK_S, look_again_s * 1.5)
                        yield from Wait(hint, pause)
                    case Failed("", _):
                        return self._turn_alone(name, key)
                    case Failed(error_type, message):
                        raise ComputeFailed(key, error_type, message)
        except BaseException as error:
            yield from self._let_lease_go(error, name, key, token)
            raise
        finally:
            if hint is not None:
                binding.forget_hint(name, hint)

    def _look_at_types(self, name: str, lead: commands.Lead) -> None:
        if lead.wrong_type:
            self.reader.complain_of_type(name)
            self.binding.outbox.found_corrupt()

    def _let_lease_go(self, error: BaseException, name: str, key: str, token: str) -> Flow[None]:
        """After a claim that was interrupted: the lease may have been given all the same; nobody shall wait for it.

        Not where the server does not answer: who calls has waited for a whole deadline already, and the lease ends.
        """
        if not isinstance(error, (GeneratorExit, AgentPerfError)):
            with suppress(AgentPerfError):
                yield from self._release(Turn(self.binding, name, key, token, self.lease_ms, None), None)

    # The flow that is returned tells the server how the turn ended, unless the turn has no token. An error is for those
    # who wait in this process at once; a value when the server has taken it, since it may be out of date by now.

    def land(
        self,
        turn: Turn,
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
            self._end(turn, Uncacheable())
            return False, self._release(turn, " ")
        if not turn.token:  # of which the server knows nothing
            self._end(turn, Landed(data, round(cost_s * 1000)))
        return True, self._store(turn, data, cost_s, ttl, tags, freshness)

    def crash(self, turn: Turn, error: Exception) -> Flow[None]:
        """End a turn with an error: all who wait for it get it. Returns what is left to do."""
        self._end(turn, Crashed(error))
        text = str(error)[:_MOST_ERROR_CHARACTERS].encode(errors="replace").decode()
        return self._release(turn, f"{type(error).__name__} {text}")

    def give_up(self, turn: Turn) -> Flow[None]:
        """End a turn without a result: whoever waits may try. Returns what is left to do."""
        self._end(turn, GivenUp())
        return self._release(turn, None)

    def let_go(self, turn: Turn) -> None:
        """Make sure that nobody in this process waits for a turn any more. Changes nothing if it ended in order."""
        self._end(turn, Uncacheable())

    def _end(self, turn: Turn, outcome: Outcome) -> None:
        if turn.flight is not None:
            self.binding.flights.end(turn.flight, outcome)

    def _store(
        self, turn: Turn, data: bytes, cost_s: float, ttl: float | None, tags: Iterable[str], freshness: Freshness
    ) -> Flow[None]:
        cost_ms = max(0, min(round(cost_s * 1000), arguments.MAX_COUNT))
        life, names = self.writer.life(ttl), stored_tags(tags)
        if freshness.jitter and not freshness.soft_ms:
            life = self.writer.spread(life, freshness)
        fresh_ms = freshness.spread(freshness.soft_ms)
        if turn.flight is not None:
            self.binding.flights.ask(turn.flight)
        try:
            outcome = yield from self.writer.store(
                turn.name, data, life, names, None, token=turn.token, cost_ms=cost_ms, fresh_ms=fresh_ms
            )
        except (BackendUnavailable, GeneratorExit):
            raise
        except BaseException:  # also where the server is full or spoilt: nobody should wait for the lease to end
            yield from self._release(turn, None)
            raise
        vouched = outcome in (PutOutcome.STORED, PutOutcome.TOO_LARGE, PutOutcome.NO_ROOM)
        self._end(turn, Landed(data, cost_ms) if vouched else GivenUp())
        if outcome is PutOutcome.LATE:
            yield from self._release(turn, None)
        if outcome is PutOutcome.TOO_LARGE:
            self.binding.complain("cache %s: %s is larger than the cache", self.binding.name, shown(turn.key))

    def _release(self, turn: Turn, error: str | None) -> Flow[None]:
        where, origin = self.binding.keys, self.binding.origin
        yield from commands.release(where, turn.name, turn.token, error=error, error_ms=ERROR_KEPT_MS, origin=origin)


def _outcome_of(error: BaseException) -> Outcome:
    """Return what others who wait make of an error met while claiming."""
    if isinstance(error, ComputeFailed):
        return Crashed(error)
    if isinstance(error, BackendUnavailable):
        return Unreachable(error)
    # with the cache in trouble they would meet the same, one after the other
    return Uncacheable() if isinstance(error, AgentPerfError) else GivenUp()
