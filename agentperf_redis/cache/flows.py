"""What a cache does, as flows: descriptions of I/O that the blocking and the asyncio client both drive."""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from agentperf_redis import arguments
from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands, wire
from agentperf_redis.cache.binding import REST_AFTER_FAILURE_S, Binding, log
from agentperf_redis.cache.commands import Await, Failed, Found, Hit, NoSettings, PutOutcome
from agentperf_redis.cache.flights import Crashed, Flight, GivenUp, Landed, Outcome, Uncacheable
from agentperf_redis.cache.local import LONGEST_LIFE_S, Copy, LocalCopies, Ticket
from agentperf_redis.cache.model import (
    CACHES_OWN_TTLS_MS,
    TIERS,
    TIERS_OWN_TTL_MS,
    CacheEntry,
    CacheStats,
    Settings,
    Tier,
    TierStats,
    ttl_ms,
)
from agentperf_redis.cache.outbox import NO_REPORT
from agentperf_redis.cache.turns import Turn
from agentperf_redis.codec import Codec
from agentperf_redis.command import Batch, Command, Flow, Wait
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    ComputeFailed,
    CorruptState,
    InvalidArgument,
    SchemaMismatch,
    Undecodable,
    shown,
)
from agentperf_redis.keys import CacheKeys

LEASE_MS: Final = 5000
"""How long a dead process keeps others from computing; the living renew."""
ERROR_KEPT_MS: Final = 5000
"""How long waiters have to learn of an error; they are told at once, and ask every 0.25 s at the latest."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.25
"""How often a waiter looks by itself, should the bus bring no word."""
_FLUSH_WAIT_S = 0.25
_ATTEMPTS = 4
_MOST_WAIT_S = 3600.0
_MOST_ERROR_CHARACTERS = 500
_COMPUTE_ANYWAY = (ComputeFailed, InvalidArgument, SchemaMismatch)
"""Errors that are no trouble of the cache: they reach whoever wanted a value."""


@dataclass(frozen=True, slots=True)
class Served:
    """There is a value, and no need to compute; what that has saved, if another computed it meanwhile."""

    value: Any
    saved_ms: int = 0


Answer: TypeAlias = Served | Turn


class _Missing:
    pass


MISSING: Final = _Missing()


class CacheFlows:
    """The operations of one cache object.

    Args:
        binding: what it shares with other objects of the same cache.
        codec: turns values into bytes.
        strict: note each read at once.
        own_ttls_ms: lives of entries put into hot, warm, cold by this object; below 0 is the cache's.
        local: copies within this process, if they are to be used.
    """

    def __init__(
        self,
        binding: Binding,
        codec: Codec,
        *,
        strict: bool = False,
        own_ttls_ms: tuple[int, int, int] = CACHES_OWN_TTLS_MS,
        local: LocalCopies | None = None,
    ) -> None:
        self.binding = binding
        self.codec = codec
        self.strict = strict
        self._own_ttls = None if own_ttls_ms == CACHES_OWN_TTLS_MS else "/".join(map(str, own_ttls_ms))
        self.local = local
        self._known_gen: tuple[bytes | None, wire.Generation] = (None, wire.NOTHING_INVALIDATED)

    # reading

    def get(self, key: str, default: Any) -> Flow[Any]:
        """Return the value of a key, or the default."""
        value = yield from self._look_up(stored_name(key), key)
        return default if value is MISSING else value

    def copied(self, key: str) -> Any:
        """Return the value of a key from its local copy, or MISSING. No I/O."""
        copy = None if self.local is None else self.local.find(key)
        if copy is None:
            return MISSING
        return copy.value if copy.frozen else self.unpacked(copy)

    def unpacked(self, copy: Copy) -> Any:
        """Return a value of one's own, made from the bytes of a local copy; MISSING if they are of no known class."""
        try:
            return self.codec.decode(copy.data)
        except Undecodable:  # copied by an object of this cache that has another registry
            return MISSING

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> Flow[dict[str, Any]]:
        """Return the values of those keys that have one."""
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        for key in distinct_keys(keys):
            value = MISSING if fresh else self.copied(key)
            if value is MISSING:
                names[stored_name(key)] = key
            else:
                values[key] = value
        if names:
            yield from self._prepare_local()
        for chunk in chunks(list(names)):
            tickets = [self._ticket(name) for name in chunk]
            *entries, gen = yield from commands.read_many(self.binding.keys, chunk)
            for name, entry, ticket in zip(chunk, entries, tickets, strict=True):
                value, stored = yield from self._value(name, (entry, gen), counted=True)
                if value is not MISSING:
                    values[names[name]] = value
                self._fill_local(names[name], name, stored, value, ticket)
            if self.binding.outbox.is_full:
                yield from flush(self.binding)
        return values

    def entry(self, key: str) -> Flow[CacheEntry | None]:
        """Return what is known of a key without counting as a read."""
        name = stored_name(key)
        where = self.binding.keys
        yield from flush(self.binding)
        entry, gen = yield from commands.read(where, name)
        value, stored = yield from self._value(name, (entry, gen), counted=False)
        if value is MISSING or stored is None:
            return None
        places = ((Tier.HOT, where.hot), (Tier.WARM, where.warm), (Tier.COLD, where.cold), (Tier.COLD, where.new))
        size, *scores = yield from Batch(
            (commands.size_of(where, name), *(commands.score(index, name) for _, index in places))
        )
        reads = int((size or 0) // _HIT)
        tier, touched = next(
            ((tier, at) for (tier, _), at in zip(places, scores, strict=True) if at is not None), (Tier.COLD, None)
        )
        return CacheEntry(
            key=key,
            value=value,
            created_at=wire.moment(stored.version),
            expires_at=datetime.fromtimestamp(stored.expires_ms / 1000, UTC) if stored.expires_ms else None,
            access_count=reads,
            last_accessed=wire.moment(int(touched // 16)) if reads and touched is not None else None,
            tier=tier,
            tags=frozenset(map(key_names.decoded, stored.tags)),
            size_bytes=int((size or 0) % _HIT),
            compute_seconds=stored.cost_ms / 1000,
        )

    def _look_up(self, name: str, key: str, *, miss: bool = True) -> Flow[Any]:
        """Read one value and note the read, or the miss unless the caller does."""
        if self.strict:
            found = yield from self._read_strictly(name)
            value, _ = yield from self._value(name, found, counted=False)  # the script has counted
            return value
        ticket = None
        if self.local is not None:
            yield from self._prepare_local()
            ticket = self.local.ticket(name)
        entry, gen = yield commands.read(self.binding.keys, name)
        # as `_value`, of which it is a copy without one more generator: this is the path of every hit
        stored, doubtful = self._opened(name, entry, gen, counted=True)
        if stored is not None and doubtful:
            stored = yield from self._untouched_by_tags(stored)
        value = self._served(name, stored, miss=miss)
        if ticket is not None:
            self._fill_local(key, name, stored, value, ticket)
        if self.binding.outbox.is_full:
            yield from flush(self.binding)
        return value

    def _prepare_local(self) -> Flow[None]:
        """Before the first copy: hear of changes, and know the server's clock, by which entries expire."""
        if self.local is not None:
            self.binding.listen()
            yield from ready(self.binding)

    def _ticket(self, name: str) -> Ticket | None:
        return None if self.local is None else self.local.ticket(name)

    def _fill_local(self, key: str, name: str, stored: wire.Stored | None, value: Any, ticket: Ticket | None) -> None:
        if self.local is None or ticket is None or stored is None or value is MISSING:
            return
        life_s = LONGEST_LIFE_S
        if stored.expires_ms:
            life_s = (stored.expires_ms - self.binding.server_ms()) / 1000
        self.local.fill(key, name, stored, value, life_s, ticket)

    def _changed(self, name: str, *, computed: bool = False) -> None:
        """After a write of this process, also one of unknown fate: it must not see its own values of before."""
        if not computed:  # what a flight brings needs not end the next one
            self.binding.flights.detach(name)
        if self.binding.local is not None:
            self.binding.local.drop(name)

    def _read_strictly(self, name: str) -> Flow[Found]:
        for _ in range(_ATTEMPTS):
            yield from ready(self.binding)
            found = yield from commands.read_strictly(self.binding.keys, name)
            if not isinstance(found, NoSettings):
                return found
            self.binding.deployed = False
        raise CorruptState(self.binding.keys.meta, "settings that do not last")

    def _value(self, name: str, found: Found, *, counted: bool) -> Flow[tuple[Any, wire.Stored | None]]:
        """Return the value of an entry with what is stored for it, or MISSING.

        Args:
            name: stored name of the key.
            found: the entry and the generation.
            counted: note a read, or a miss.
        """
        stored, doubtful = self._opened(name, *found, counted=counted)
        if stored is not None and doubtful:
            stored = yield from self._untouched_by_tags(stored)
        return self._served(name, stored, counted=counted), stored

    def _opened(
        self, name: str, entry: bytes | None, gen: bytes | None, *, counted: bool
    ) -> tuple[wire.Stored | None, bool]:
        """Return an entry unless it was cleared or is none of ours, and whether its tags have to be looked at."""
        if entry is None:
            return None, False
        try:
            stored = wire.parse(entry)
            known = self._known_gen  # parsed once, since it seldom changes; replaced whole, for other threads' sake
            if gen != known[0]:
                known = gen, wire.NOTHING_INVALIDATED if gen is None else wire.parse_generation(gen)
                self._known_gen = known
        except Undecodable as error:
            self._complain_of(name, error, counted=counted)
            return None, False
        version, generation = stored.version, known[1]
        if version <= generation.floor or (stored.tags and version <= generation.tag_floor):
            return None, False
        return stored, bool(stored.tags) and version <= generation.tagged

    def _untouched_by_tags(self, stored: wire.Stored) -> Flow[wire.Stored | None]:
        """Return an entry older than the last invalidation of any tag, unless that was one of its own."""
        # the generation once more, after the marks: what was merged into its tag floor is not among them any more
        where = self.binding.keys
        both: Batch[Any] = Batch((commands.tag_marks(where, stored.tags), commands.generation(where)))
        newest, gen = yield from both
        try:
            known = wire.NOTHING_INVALIDATED if gen is None else wire.parse_generation(gen)
        except Undecodable:
            raise CorruptState(where.gen, "no three versions") from None
        return stored if stored.version > max(newest, known.floor, known.tag_floor) else None

    def _served(self, name: str, stored: wire.Stored | None, *, counted: bool = True, miss: bool = True) -> Any:
        """Return the value of what is stored, or MISSING, and note the read or the miss."""
        if stored is not None:
            try:
                value = self.codec.decode(stored.data)
            except Undecodable as error:
                self._complain_of(name, error, counted=counted)
            else:
                if counted:
                    self.binding.outbox.read(name, stored.cost_ms)
                return value
        if counted and miss:
            self.binding.outbox.missed()
        return MISSING

    def _complain_of(self, name: str, error: Undecodable, *, counted: bool) -> None:
        self.binding.complain("cache %s: entry %s counts as missing: %s", self.binding.name, shown(name), error)
        if counted:
            self.binding.outbox.found_corrupt()

    # writing

    def _life(self, ttl: float | None) -> int | str:
        """Check a life given by a user; this object's own if he gave none."""
        life = ttl_ms("ttl", ttl)
        return self._own_ttls if life == TIERS_OWN_TTL_MS and self._own_ttls else life

    def put(self, key: str, value: Any, ttl: float | None, tags: Iterable[str], tier: Tier | None = None) -> Flow[bool]:
        """Store a value. Returns whether it was stored."""
        life = self._life(ttl)
        names = stored_tags(tags)
        reply = yield from self._put(stored_name(key), self.codec.encode(value), life, names, tier)
        return reply is PutOutcome.STORED

    def put_many(
        self, values: Mapping[str, Any], ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[int]:
        """Store several values. Returns how many were stored."""
        life = self._life(ttl)
        names = stored_tags(tags)
        if not isinstance(values, Mapping):
            raise InvalidArgument("values", values, "a mapping of keys to values")
        items = [(stored_name(key), self.codec.encode(value)) for key, value in values.items()]
        if not items:
            return 0
        # the first one brings the settings and the report along; the others need neither
        first, *rest = items
        stored = int((yield from self._put(*first, life, names, tier)) is PutOutcome.STORED)
        for start in range(0, len(rest), commands.MAX_KEYS):
            chunk = rest[start : start + commands.MAX_KEYS]
            until_ms = self._until_ms()
            puts = [self._put_command(name, data, life, names, tier, until_ms) for name, data in chunk]
            batch = tuple(command for _, command in puts)
            try:
                replies = yield from Batch(batch)
            except BaseException as error:
                yield from self._bury(error, tuple(request for request, _ in puts), until_ms)
                raise
            finally:
                for name, _ in chunk:
                    self._changed(name)
            for (name, data), reply in zip(chunk, replies, strict=True):
                outcome = reply.outcome
                if outcome in (PutOutcome.NO_SETTINGS, PutOutcome.LATE):
                    outcome = yield from self._put(name, data, life, names, tier)
                self.binding.learn(reply.version if outcome is PutOutcome.STORED else 0)
                stored += outcome is PutOutcome.STORED
        return stored

    def _put(
        self,
        name: str,
        data: bytes,
        life_ms: int | str,
        tags: tuple[str, ...],
        tier: Tier | None,
        *,
        token: str = "",
        cost_ms: int = 0,
    ) -> Flow[PutOutcome]:
        binding, outbox = self.binding, self.binding.outbox
        request, seen, again = secrets.token_urlsafe(9), binding.seen, False
        for _ in range(_ATTEMPTS):
            yield from ready(binding)
            flushing = outbox.flushing
            if flushing is not None:  # touches that are under way come before this put, so that the order is exact
                yield from Wait(flushing, _FLUSH_WAIT_S)
            if outbox.is_full:
                yield from flush(binding)
            report, asked_at, taken_in, until_ms = outbox.take(), time.monotonic(), False, self._until_ms()
            try:
                reply = yield from commands.put(
                    binding.keys,
                    name,
                    wire.payload(request, cost_ms, tags, data),
                    request,
                    until_ms=until_ms,
                    seen=seen,
                    again=again,
                    ttl_ms=life_ms,
                    tier=tier,
                    token=token,
                    origin=binding.origin,
                    writer=outbox.writer,
                    report=report,
                    tags=tags,
                )
                # a report is sent again wherever that is not sure: the server recognises it
                taken_in = reply.outcome is PutOutcome.STORED
            except BaseException as error:
                if not token:  # whoever writes the key makes an end of the lease, and so of late copies of a fill
                    yield from self._bury(error, (request,), until_ms)
                raise
            finally:
                outbox.settle(report, taken_in=taken_in)
                self._changed(name, computed=bool(token))
            if reply.outcome is PutOutcome.NO_SETTINGS:
                binding.deployed = False
            elif reply.outcome is PutOutcome.LATE:
                binding.set_clock(reply.version, asked_at)
                again = True  # an earlier copy of it may have been executed
            else:
                binding.learn(reply.version)
                if reply.version:
                    binding.set_clock(reply.version * 1000 / wire.CLOCK_PER_S, asked_at)
                return reply.outcome
        return PutOutcome.LATE

    def _until_ms(self) -> int:
        """Return the server's time after which a put that is sent now shall do nothing."""
        return self.binding.server_ms() + math.ceil(self.binding.backend.deadline * 1000)

    def _bury(self, error: BaseException, requests: tuple[str, ...], until_ms: int) -> Flow[None]:
        """After an interruption (a cancelled task, Ctrl-C): copies of puts under way must not undo what comes next.

        If the server cannot be told, it takes as long to find out as the copies are good for.
        """
        if not isinstance(error, (AgentPerfError, GeneratorExit)):
            with suppress(AgentPerfError):
                yield from commands.bury(self.binding.keys, requests, until_ms)

    def _put_command(
        self, name: str, data: bytes, life_ms: int | str, tags: tuple[str, ...], tier: Tier | None, until_ms: int
    ) -> tuple[str, Command[commands.PutReply]]:
        binding = self.binding
        request = secrets.token_urlsafe(9)
        return request, commands.put(
            binding.keys,
            name,
            wire.payload(request, 0, tags, data),
            request,
            until_ms=until_ms,
            seen=binding.seen,
            again=False,
            ttl_ms=life_ms,
            tier=tier,
            token="",
            origin=binding.origin,
            writer=binding.outbox.writer,
            report=NO_REPORT,
            tags=tags,
        )

    # forgetting

    def delete_many(self, keys: Iterable[str]) -> Flow[int]:
        """Remove entries. Returns how many there were."""
        names = list(dict.fromkeys(map(stored_name, distinct_keys(keys))))
        removed = 0
        for chunk in chunks(names):
            for _ in range(_ATTEMPTS):
                yield from ready(self.binding)
                try:
                    reply = yield from commands.delete(self.binding.keys, chunk, self.binding.origin)
                finally:
                    for name in chunk:
                        self._changed(name)
                if not isinstance(reply, NoSettings):
                    removed += reply[0]
                    self.binding.learn(reply[1])
                    break
                self.binding.deployed = False
        return removed

    def delete(self, key: str) -> Flow[bool]:
        """Remove one entry. Returns whether there was one."""
        stored_name(key)  # so that a refusal names the argument of this method
        removed = yield from self.delete_many((key,))
        return removed > 0

    def clear(self) -> Flow[None]:
        """Make every entry a miss."""
        yield from ready(self.binding)
        try:
            _, version = yield from commands.clear(self.binding.keys, self.binding.origin)
        finally:
            self.binding.flights.detach_all()
            if self.binding.local is not None:
                self.binding.local.flush()
        self.binding.learn(version)

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Make every entry with one of the tags a miss."""
        names = stored_tags(tags)
        if names:
            yield from ready(self.binding)
            for chunk in chunks(list(names)):
                try:
                    version = yield from commands.invalidate_tags(self.binding.keys, tuple(chunk), self.binding.origin)
                finally:
                    self.binding.flights.detach_all()  # what tags their values will have is not known yet
                    for tag in chunk:
                        if self.binding.local is not None:
                            self.binding.local.drop_tag(tag)
                self.binding.learn(version)

    def sweep(self) -> Flow[int]:
        """Clear away all that is expired, cleared or dropped. Returns how many entries and values that were."""
        total, cursor = 0, "0"
        yield from ready(self.binding)
        while True:
            swept = yield from commands.sweep(self.binding.keys, cursor)
            if isinstance(swept, NoSettings):
                return total
            total += swept.expired + swept.freed + swept.orphans + swept.evicted
            cursor = swept.cursor
            if cursor == "0" and not swept.more:
                return total

    # computing

    def answer_or_turn(self, key: str, *, look: bool = True) -> Flow[Answer]:
        """Return the value of a key, or the turn to compute it, which must end with `land`, `crash` or `give_up`.

        Waits for whoever computes it already, in this process or another.

        Args:
            key: the key.
            look: False computes anew although there is a value.

        Raises:
            ComputeFailed: another process computed, and failed.
            Exception: another thread or task of this process computed, and failed with this.
        """
        name = stored_name(key)
        try:
            if look:
                value = yield from self._look_up(name, key, miss=False)
                if value is not MISSING:
                    return Served(value)
            answer: Answer | None = None
            try:
                answer = yield from self._turn(name, key, look=look)
            finally:  # what another computes for us is a hit, the one that saves most
                if look and not self.strict:  # whose script has counted
                    if isinstance(answer, Served):
                        self.binding.outbox.read(name, answer.saved_ms)
                    else:
                        self.binding.outbox.missed()
        except _COMPUTE_ANYWAY:
            raise
        except AgentPerfError as error:
            return self.without_it(key, error)
        return answer

    def _turn_alone(self, name: str, key: str) -> Turn:
        return Turn(self.binding, name, key, "", LEASE_MS, None)

    def _turn(self, name: str, key: str, *, look: bool) -> Flow[Answer]:
        flights = self.binding.flights
        while True:
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
                    return Served(self.codec.decode(data), cost_ms)
                case Crashed(original):
                    raise original
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
            ignore = version_text(entry)
        try:
            while True:
                if hint is not None:
                    hint.reset()
                binding.flights.ask(flight)
                reply = yield from commands.claim(
                    binding.keys, name, token, lease_ms=LEASE_MS, ignore=ignore, awaited=awaited
                )
                match reply:
                    case commands.Lead():
                        return Turn(binding, name, key, token, LEASE_MS, flight)
                    case Hit(found):
                        value, stored = yield from self._value(name, found, counted=False)
                        if value is not MISSING and stored is not None:
                            binding.flights.end(flight, Landed(stored.data, stored.cost_ms))
                            return Served(value, stored.cost_ms)
                        ignore = version_text(found[0])
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
        except GeneratorExit:
            raise
        except BaseException as error:
            # the lease may have been given to us all the same: nobody should wait for it to end
            if not isinstance(error, AgentPerfError) or getattr(error, "outcome", None) == "unknown":
                with suppress(AgentPerfError):
                    turn = Turn(binding, name, key, token, LEASE_MS, None)
                    yield from self._release(turn, None)
            raise
        finally:
            if hint is not None:
                binding.forget_hint(name, hint)

    @property
    def rests(self) -> bool:
        """Whether the server was found away just now, so that asking it would only take time."""
        return time.monotonic() < self.binding.rest_until

    def turn_alone(self, key: str) -> Turn:
        """Return the turn to compute a key by oneself."""
        return self._turn_alone(stored_name(key), key)

    def without_it(self, key: str, error: AgentPerfError) -> Turn:
        """Return the turn to compute a key by oneself, because the cache is in trouble."""
        if isinstance(error, BackendUnavailable):
            self.binding.rest_until = time.monotonic() + REST_AFTER_FAILURE_S
        self.binding.complain("cache %s: computing without it: %s", self.binding.name, error)
        return self.turn_alone(key)

    # The flow that is returned tells the server how the turn ended, unless the turn has no token. An error is for those
    # who wait in this process at once; a value when the server has taken it, since it may be out of date by now.

    def land(
        self, turn: Turn, value: Any, cost_s: float, ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> tuple[bool, Flow[None]]:
        """End a turn with a value. Returns whether it is one that can be stored, and what is left to do."""
        try:
            data = self.codec.encode(value)
        except InvalidArgument:
            self._end(turn, Uncacheable())
            return False, self._release(turn, " ")
        return True, self._store(turn, data, cost_s, ttl, tags, tier)

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
        self, turn: Turn, data: bytes, cost_s: float, ttl: float | None, tags: Iterable[str], tier: Tier | None
    ) -> Flow[None]:
        cost_ms = max(0, min(round(cost_s * 1000), arguments.MAX_COUNT))
        life, names = self._life(ttl), stored_tags(tags)
        if turn.flight is not None:
            self.binding.flights.ask(turn.flight)
        try:
            outcome = yield from self._put(turn.name, data, life, names, tier, token=turn.token, cost_ms=cost_ms)
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

    # looking

    def stats(self) -> Flow[CacheStats]:
        """Return what all processes have done with the cache, this one's reads included."""
        yield from flush(self.binding)
        snapshot = yield from read_stats(self.binding.backend, self.binding.service, self.binding.name)
        return snapshot or _no_stats(self.binding.name, self.binding.settings)

    def size(self) -> Flow[int]:
        """Return how many entries there are."""
        count = yield from commands.members(self.binding.keys.size, of_hash=True)
        return count

    def oldest_first(self) -> Flow[list[str]]:
        """Return the stored names of all entries by last touch, the next to leave first."""
        yield from flush(self.binding)
        return (yield from read_keys(self.binding.keys))


_HIT = 10**10
_PAGE = 1000


def read_keys(where: CacheKeys, most: int | None = None) -> Flow[list[str]]:
    """Return the stored names of at most `most` entries, oldest touch first."""
    scored: list[tuple[float, str]] = []
    for index in (where.cold, where.new, where.warm, where.hot):
        first = 0
        while most is None or len(scored) < most:
            page = yield from commands.oldest_first(index, first, first + _PAGE - 1)
            scored += [(at, name) for name, at in page]
            first += len(page)
            if len(page) < _PAGE:
                break
    names = [name for _, name in sorted(scored)]
    return names if most is None else names[:most]


def read_stats(backend: Backend, service: str, name: str) -> Flow[CacheStats | None]:
    """Return the statistics of any cache of a namespace, or None if it has no settings."""
    where = key_names.cache(backend.namespace, service, name)
    text, count = yield from commands.counters(where)
    settings = Settings.parse(text)
    if settings is None:
        return None
    size, hot, warm, cold, new = yield from Batch(
        (
            commands.members(where.size, of_hash=True),
            *(commands.members(index) for index in (where.hot, where.warm, where.cold, where.new)),
        )
    )
    hits = [count[tier.value] for tier in TIERS]
    misses = count["misses"]
    come = sum(hits) + misses
    tiers = []
    for room, entries, served in zip(settings.rooms, (hot, warm, cold + new), hits, strict=True):
        # a read comes to hot first, and goes on to the next tier where it is not served
        tiers.append(TierStats(entries, room, served, come - served))
        come -= served
    return CacheStats(
        name,
        settings,
        tiers[0],
        tiers[1],
        tiers[2],
        hits=sum(hits),
        misses=misses,
        size=size,
        bytes=count["bytes"],
        evictions=count["evicted"],
        expirations=count["expired"],
        corrupt=count["corrupt"],
        seconds_saved=count["saved_ms"] / 1000,
    )


def read_all_stats(backend: Backend) -> Flow[list[CacheStats]]:
    """Return the statistics of every cache of a namespace, by service and name."""
    found = []
    for service in ("cache", "tiered"):
        for name in (yield from backend.entered(service)):
            snapshot = yield from read_stats(backend, service, name)
            if snapshot is not None:
                found.append(snapshot)
    return found


def _no_stats(name: str, settings: Settings) -> CacheStats:
    hot, warm, cold = (TierStats(0, room, 0, 0) for room in settings.rooms)
    return CacheStats(name, settings, hot, warm, cold, 0, 0, 0, 0, 0, 0, 0, 0.0)


def ready(binding: Binding) -> Flow[None]:
    """Before the first write of a process: note that the cache is in use, and write its settings."""
    if binding.deployed:
        return
    yield from binding.backend.enter(binding.service, binding.name)
    asked_at = time.monotonic()
    reply = yield from commands.deploy(binding.keys, binding.settings, binding.given)
    if isinstance(reply, commands.NewerSchema):
        raise SchemaMismatch(f"cache {binding.name}", str(reply.schema), f"schema {commands.SCHEMA} or lower")
    if reply.before not in ("", reply.settings):
        log.warning("cache %s: settings changed from %s to %s", binding.name, reply.before, reply.settings)
    binding.settings = Settings.parse(reply.settings) or binding.settings
    binding.set_clock(reply.now_ms, asked_at)
    binding.learn(reply.now_ms * wire.CLOCK_PER_S // 1000)
    binding.deployed = True


def flush(binding: Binding) -> Flow[None]:
    """Report all reads that wait."""
    outbox, attempts = binding.outbox, 0
    if outbox.flushing is not None:
        yield from Wait(outbox.flushing, _FLUSH_WAIT_S)
    while attempts < _ATTEMPTS:
        report, taken_in = outbox.take(flush=True), False
        if report is NO_REPORT:
            return
        try:
            yield from ready(binding)
            asked_at = time.monotonic()
            now_ms = yield from commands.touch(binding.keys, outbox.writer, report)
            if now_ms is not None:
                taken_in = True
                binding.set_clock(now_ms, asked_at)
        finally:
            outbox.settle(report, taken_in=taken_in)
        if not taken_in:
            binding.deployed = False
            attempts += 1


def _outcome_of(error: BaseException) -> Outcome:
    """Return what others who wait make of an error met while claiming."""
    if isinstance(error, ComputeFailed):
        return Crashed(error)
    # with the cache in trouble they would meet the same, one after the other
    return Uncacheable() if isinstance(error, AgentPerfError) else GivenUp()


def stored_name(key: object) -> str:
    """Check a key given by a user and return the name under which its entry is stored."""
    return key_names.stored_name(arguments.cache_key("key", key))


def stored_tags(tags: object) -> tuple[str, ...]:
    """Check tags given by a user and return them without repetition, as stored."""
    if tags == ():
        return ()
    return tuple(dict.fromkeys(map(key_names.encoded, arguments.names("tags", tags))))


def distinct_keys(keys: object) -> list[str]:
    """Check several keys given by a user; one bare string is refused, since it would be taken apart into letters."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise InvalidArgument("keys", keys, "a collection of keys, such as a list of strings")
    return list(dict.fromkeys(arguments.cache_key("keys", key) for key in keys))


def chunks(names: Sequence[str]) -> list[list[str]]:
    """Cut names into what one command takes."""
    return [list(names[start : start + commands.MAX_KEYS]) for start in range(0, len(names), commands.MAX_KEYS)]


def version_text(entry: bytes | None) -> str:
    """Return the version with which an entry begins, as text; empty for none."""
    head = (entry or b"").split(b" ", 1)[0]
    return head.decode() if head.isdigit() else ""
