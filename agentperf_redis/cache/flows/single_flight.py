"""Single flight: of all processes, threads and tasks that miss a value, one computes it, and the others wait for it.

Within a process, `flights` coordinates threads and tasks. Among processes, the computing process holds a lease, which
`claim.lua` grants. When the computation ends, a message on the bus wakes the waiters of other processes. Waiters also
poll, in case the message is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

from agentperf_redis import arguments
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.commands.claims import Await, Failed, Hit
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.access_reports import flush, flush_if_possible
from agentperf_redis.cache.flows.reads import MISSING, Reader
from agentperf_redis.cache.flows.settings import follow, shard_to_read, shard_to_write
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
    Unstorable,
)
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow, Wait
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    ComputeFailed,
    CorruptState,
    InvalidArgument,
    SchemaMismatch,
    shown,
)
from agentperf_redis.random_numbers import uniform

DEFAULT_LEASE_S: Final = 5.0
"""How long a crashed process delays other callers. A live process renews its lease every third of this time."""
MIN_LEASE_S: Final = 0.1
"""Minimum TTL of a lease: long enough for a renewal to arrive in time, even from a busy process."""
ERROR_KEPT_MS: Final = 5000
"""How long an error is kept for waiters. Waiters are notified at once, and also poll for it at least every 0.25 s."""
_MIN_POLL_S, _MAX_POLL_S = 0.02, 0.25
"""Bounds of a waiter's poll interval. Waiters poll in case the message that wakes them is lost."""
_LOOK_EVERY_S = 1.0
"""How often a waiter checks whether the event loop that computes the value is still running."""
_MAX_ERROR_CHARACTERS = 500
_READ_ONCE = (Iterator, AsyncIterator, Awaitable)
"""Types of values that can be read only once, so that callers cannot share such a value."""
_RAISED = (ComputeFailed, InvalidArgument, SchemaMismatch)
"""Errors that the cache itself did not cause: they are raised to the caller."""


class SingleFlight:
    """Computations of one cache object.

    Args:
        reader: the object's reader.
        writer: the object's writer, which stores computed values.
        lease_ms: TTL of the compute lease, ms. A process that crashes delays other callers for at most this time.
        on_unavailable: how a value is computed while the server is unreachable.
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
        """Return the value of a key, or a lease to compute it.

        The caller must end the lease with `finish`, `crash` or `give_up`. Waits while another caller, in any process,
        computes the value. If that caller is a thread or task of this process, an error of its function is returned,
        not raised, since the error may be a StopIteration.

        Args:
            key: the key.
            freshness: how to treat a value that is no longer fresh.
            look: False computes the value even if one is stored.
            blocking: True if the calling thread is blocked during the wait.

        Raises:
            ComputeFailed: the function failed in another process.
            BackendUnavailable: the server does not answer, and `on_unavailable` is RAISE.
        """
        name, counts = stored_name(key), look
        try:
            if look:
                refusable = freshness.error_ms is not None  # whether a found value may still count as a miss
                value, stored = yield from self.reader.look_up(name, key, miss=False, hit=not refusable)
                if value is not MISSING:
                    served: Served | None = Served(value)
                    if stored is not None and freshness.concerns(stored):
                        served = yield from self._value_by_age(name, value, stored, freshness)
                    if served is not None:
                        if refusable:
                            yield from self._note_hit(name, 0 if stored is None else stored.cost_ms)
                        return served
                    look = False
            answer: Answer | Crashed | None = None
            try:
                answer = yield from self._join_or_claim(name, key, look=look, blocking=blocking)
            finally:  # a value that another caller computed counts as a hit, since it saves a computation
                if counts:
                    if isinstance(answer, Served):
                        self.shared.shard(name).access_buffer.read(name, answer.saved_ms)
                    else:
                        self.shared.shard(name).access_buffer.missed()
            if isinstance(answer, Served) and self.reader.strict:
                yield from flush_if_possible(flush(self.shared.shard(name)), self.shared)
        except _RAISED:
            raise
        except BackendUnavailable as error:
            if self.on_unavailable is WithoutServer.RAISE:
                raise
            self._warn(error)
        except AgentPerfError as error:
            self._warn(error)
            return self._lease_without_claim(name, key)
        else:
            return answer
        return (yield from self._without_server(name, key, freshness, look=look, blocking=blocking))

    def _note_hit(self, name: str, saved_ms: int) -> Flow[None]:
        self.shared.shard(name).access_buffer.read(name, saved_ms)
        if self.reader.strict:
            yield from flush_if_possible(flush(self.shared.shard(name)), self.shared)

    def _without_server(
        self, name: str, key: str, freshness: Freshness, *, look: bool, blocking: bool = False
    ) -> Flow[Answer | Crashed]:
        """Return a stale copy if that is allowed; if not, a lease to compute, or the result of another local caller."""
        local, flights = self.reader.local, self.shared.flights
        copy = local.serve_stale(key, freshness.serve_stale_s) if look and local is not None else None
        if copy is not None and freshness.age(copy, self.shared.shard(name).server_ms()) is not Age.OLD:
            value = copy.value if copy.frozen else self.reader.unpacked(copy)
            if value is not MISSING:
                self.shared.shard(name).access_buffer.read(name, copy.cost_ms)
                return Served(value)
        while True:
            if flights.waits_for_itself(name, blocking=blocking):
                return self._lease_without_claim(name, key)
            flight, requests_before = flights.join(name)
            if requests_before is None:
                return ComputeLease(self.shared, name, key, "", self.lease_ms, flight)
            while not (yield from Wait(flight.ended, _LOOK_EVERY_S)):
                flights.end_if_stuck(flight)
            match flight.outcome:
                case Computed(data, cost_ms):
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Unstorable(value):
                    return Served(value)
                case Crashed() as crashed:
                    return crashed
                case Uncacheable():
                    return self._lease_without_claim(name, key)

    def _warn(self, error: AgentPerfError) -> None:
        self.shared.warn("cache %s: computing without the cache: %s", self.shared.name, error)

    def _value_by_age(
        self, name: str, value: Any, stored: entry_format.Stored, freshness: Freshness
    ) -> Flow[Served | None]:
        """Return a value that was found; None if it is too old for stale-if-error and the latest computation failed."""
        try:
            shard = yield from shard_to_write(self.shared, name)  # reads the server's clock, which `age` needs
        except BackendUnavailable:  # the server was lost after the value had been read
            return Served(value)
        age = freshness.age(stored, shard.server_ms())
        if age is Age.FRESH:
            return Served(value)
        if age is Age.OLD and (yield from commands.computing_failed(shard.keys, name)):
            return None
        return Served(value, stale=stored.version)

    def refresh_lease(self, key: str, stale: int, freshness: Freshness) -> Flow[ComputeLease | None]:
        """Return the lease to refresh a stale value, or None if this process should not refresh it.

        Returns None if another caller, in any process, is refreshing the value, or if a refresh has just failed.

        Args:
            key: the key.
            stale: version of the stale value.
            freshness: its `retry_ms` is the time for which no process retries after a failed refresh.
        """
        shared, name, token = self.shared, stored_name(key), secrets.token_hex(8)
        flight, requests_before = shared.flights.join(name)
        if requests_before is not None:
            return None
        compute_lease = None
        try:
            shared.flights.note_request(flight)
            shard = yield from shard_to_read(shared, name)
            reply = yield from commands.claim(
                *(shard.keys, name, token),
                lease_ms=self.lease_ms,
                ignore=entry_format.version_digits(stale).decode(),
                retry_ms=freshness.retry_ms,
            )
            if isinstance(reply, commands.Lead):
                self._warn_of_wrong_type(name, reply)
                compute_lease = ComputeLease(shared, name, key, token, self.lease_ms, flight)
            return compute_lease
        except BaseException as error:
            yield from self._release_interrupted(error, name, key, token)
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
            flight, requests_before = flights.join(name)
            if requests_before is None:
                try:
                    answer = yield from self._claim(name, key, flight, look=look)
                except GeneratorExit:
                    flights.end(flight, GivenUp())
                    raise
                except BaseException as error:
                    flights.end(flight, _outcome_of(error))
                    raise
                return answer
            while not (yield from Wait(flight.ended, _LOOK_EVERY_S)):
                flights.end_if_stuck(flight)
            match flight.outcome:
                case Computed(data, cost_ms) if requests_before < flight.requests:
                    return Served(self.reader.codec.decode(data), cost_ms)
                case Unstorable(value) if requests_before < flight.requests:
                    return Served(value)
                case Crashed() as crashed:
                    return crashed
                case Unreachable(unavailable):
                    raise unavailable
                case Uncacheable():
                    return self._lease_without_claim(name, key)
                case _:
                    look = True

    def _claim(self, name: str, key: str, flight: Flight, *, look: bool) -> Flow[Answer]:
        """Claim the compute lease from the server, or wait for the result of the process that holds it."""
        shared = self.shared
        token, ignore, awaited, poll_s = secrets.token_hex(8), "", "", _MIN_POLL_S
        wake_up = None
        shard = yield from shard_to_read(shared, name)
        if not look:
            entry, _ = yield commands.read(shard.keys, name)
            ignore = entry_format.version_text(entry)
        try:
            while True:
                if wake_up is not None:
                    wake_up.reset()
                if shard.retired:
                    shard = yield from shard_to_read(shared, name)
                shared.flights.note_request(flight)
                reply = yield from commands.claim(
                    shard.keys, name, token, lease_ms=self.lease_ms, ignore=ignore, awaited=awaited
                )
                match reply:
                    case NoSettings():  # the entries move to another layout
                        if not (yield from follow(shard)):
                            raise CorruptState(shard.keys.meta, "a closed shard, but no settings with another layout")
                        shard = yield from shard_to_read(shared, name)
                    case commands.Lead():
                        self._warn_of_wrong_type(name, reply)
                        return ComputeLease(shared, name, key, token, self.lease_ms, flight)
                    case Hit(found):
                        value, stored = yield from self.reader.value(shard, name, found, counted=False)
                        if value is not MISSING and stored is not None:
                            shared.flights.end(flight, Computed(stored.data, stored.cost_ms))
                            return Served(value, stored.cost_ms)
                        ignore = entry_format.version_text(found[0])
                    case Await(left_ms, held):
                        if wake_up is None:
                            wake_up = shared.wake_up_for(name)
                        awaited = held
                        pause = min(poll_s * uniform(0.8, 1.2), left_ms / 1000 + 0.005)
                        poll_s = min(_MAX_POLL_S, poll_s * 1.5)
                        yield from Wait(wake_up, pause)
                    case Failed("", _):  # the value cannot be stored, so this process computes it for itself
                        return ComputeLease(shared, name, key, "", self.lease_ms, flight)
                    case Failed(error_type, message):
                        raise ComputeFailed(key, error_type, message)
        except BaseException as error:
            yield from self._release_interrupted(error, name, key, token)
            raise
        finally:
            if wake_up is not None:
                shared.forget_wake_up(name, wake_up)

    def _warn_of_wrong_type(self, name: str, lead: commands.Lead) -> None:
        if lead.wrong_type:
            self.reader.warn_of_wrong_type(name)
            self.shared.shard(name).access_buffer.found_corrupt()

    def _release_interrupted(self, error: BaseException, name: str, key: str, token: str) -> Flow[None]:
        """Release the lease after an interrupted claim. The lease may exist, and must delay no other caller.

        If the server does not answer, the lease is released later: the caller has already waited a whole deadline.
        """
        if isinstance(error, BackendUnavailable) and error.outcome == "unknown":
            self.shared.shard(name).release_later(name, token, self.lease_ms)
        elif not isinstance(error, (GeneratorExit, AgentPerfError)):
            with suppress(AgentPerfError):
                yield from self._release(ComputeLease(self.shared, name, key, token, self.lease_ms, None), None)

    # `finish`, `crash` and `give_up` end a computation. Each returns a flow that reports the end to the server. The
    # caller runs this flow if the lease has a token.
    #
    # An error is passed to the waiters of this process at once. If the lease has no token, a value is also passed on at
    # once. If the lease has a token, a value is passed on only after the server has confirmed that the key was not
    # invalidated during the computation.

    def finish(
        self,
        compute_lease: ComputeLease,
        value: Any,
        cost_s: float,
        ttl: float | None,
        tags: Iterable[str],
        freshness: Freshness = UNTIL_EXPIRY,
    ) -> tuple[InvalidArgument | None, Flow[None]]:
        """End a computation with a value.

        Returns:
            The error that says why the value cannot be stored (None if it can), and the flow that reports the end.
        """
        try:
            data = self.reader.codec.encode(value)
        except Exception as error:  # noqa: BLE001  from a user's codec; the caller still gets the value
            refused = error if isinstance(error, InvalidArgument) else _not_encoded(value, error)
            if isinstance(value, _READ_ONCE):
                self._end(compute_lease, Uncacheable())
            if not compute_lease.token:
                self._end(compute_lease, Unstorable(value))
            return refused, self._share(compute_lease, Unstorable(value), tags)
        if not compute_lease.token:  # the server does not know this lease
            self._end(compute_lease, Computed(data, round(cost_s * 1000)))
        return None, self._store(compute_lease, data, cost_s, ttl, tags, freshness)

    def crash(self, compute_lease: ComputeLease, error: Exception) -> Flow[None]:
        """End a computation with an error, which all waiters get. Returns the flow that reports the end."""
        self._end(compute_lease, Crashed(error))
        text = str(error)[:_MAX_ERROR_CHARACTERS].encode(errors="replace").decode()
        return self._report_end(compute_lease, f"{type(error).__name__} {text}")

    def give_up(self, compute_lease: ComputeLease) -> Flow[None]:
        """End a computation without a result, so that a waiter may compute. Returns the flow that reports the end."""
        self._end(compute_lease, GivenUp())
        return self._report_end(compute_lease, None)

    def release_waiters(self, compute_lease: ComputeLease) -> None:
        """Release all waiters of this process. Does nothing if the computation has already ended."""
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
            self.shared.flights.note_request(compute_lease.flight)
        try:
            reply = yield from self.writer.store(
                compute_lease.key,
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
        except BaseException:  # such as BackendFull: end the lease, so that no caller waits until it expires
            yield from self._release(compute_lease, None)
            raise
        outcome = reply.outcome
        confirmed = outcome in (PutResult.STORED, PutResult.TOO_LARGE, PutResult.NO_CAPACITY)
        self._end(compute_lease, Computed(data, cost_ms) if confirmed else GivenUp())
        if outcome is PutResult.LATE:
            yield from self._release(compute_lease, None)
        if outcome is PutResult.TOO_LARGE:
            self.shared.warn("cache %s: %s is larger than the cache", self.shared.name, shown(compute_lease.key))

    def _share(self, compute_lease: ComputeLease, outcome: Unstorable, tags: Iterable[str]) -> Flow[None]:
        """Release the lease of a value that cannot be stored. Share the value if the server confirms its validity."""
        if compute_lease.flight is not None:
            self.shared.flights.note_request(compute_lease.flight)
        valid = yield from self._release(compute_lease, " ", tagged=bool(stored_tags(tags)))
        self._end(compute_lease, outcome if valid else GivenUp())

    def _release(self, compute_lease: ComputeLease, error: str | None, *, tagged: bool = False) -> Flow[bool]:
        """Release a lease. Returns whether it was still held and the key was not invalidated since the claim."""
        where, origin = self.shared.shard(compute_lease.name).keys, self.shared.origin
        return (
            yield from commands.release(
                *(where, compute_lease.name, compute_lease.token),
                error=error,
                error_ms=ERROR_KEPT_MS,
                origin=origin,
                tagged=tagged,
            )
        )

    def _report_end(self, compute_lease: ComputeLease, error: str | None) -> Flow[None]:
        yield from self._release(compute_lease, error)


def _not_encoded(value: Any, error: Exception) -> InvalidArgument:
    allowed = f"a value that the codec encodes; it raised {type(error).__name__}: {shown(str(error))}"
    return InvalidArgument("value", value, allowed)


def _outcome_of(error: BaseException) -> FlightOutcome:
    """Return the outcome that the waiters of this process get after an error during a claim."""
    if isinstance(error, ComputeFailed):
        return Crashed(error)
    if isinstance(error, BackendUnavailable):
        return Unreachable(error)
    # If the cache itself fails, each waiter computes its own value. After `GivenUp`, the waiters would claim the lease
    # one after the other, and all claims would fail.
    return Uncacheable() if isinstance(error, AgentPerfError) else GivenUp()
