"""Stores values. A put is executed at most once, no matter how late or how often it is delivered; see `put.lua`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from agentperf_redis import arguments
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.commands.entries import Mode, PutReply, PutResult
from agentperf_redis.cache.flows.access_reports import flush, under_way
from agentperf_redis.cache.flows.cancelling import cancel_requests
from agentperf_redis.cache.flows.settings import ATTEMPTS, shard_to_write
from agentperf_redis.cache.freshness import Freshness
from agentperf_redis.cache.model import CACHES_OWN_TTLS_MS, TIERS_OWN_TTL_MS, StoredCount, Tier, ttl_ms
from agentperf_redis.cache.process.access_buffer import NO_REPORT, AccessReport
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Batch, Command, Flow, WakeUp
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument, NoInteger

MAX_INTEGER = 2**53 - 1
"""Maximum number that `incr` adds or stores: up to this number, every integer is an exact double in Lua."""
_Repeated: TypeAlias = tuple[str, int]
"""A request that was sent before: its id, and the newest version of the shard that this process knew at that time."""
_PLAIN = Codec()
_NOTHING_DONE = (PutResult.CONDITION_FAILED, PutResult.NO_INTEGER, PutResult.OUT_OF_RANGE)


class Writer:
    """Puts of one cache object.

    Args:
        shared: the state shared with other objects of the same cache.
        codec: encodes and decodes values.
        own_ttls_ms: TTLs of entries that this object puts into hot, warm and cold; a negative one means the cache's
            default.
    """

    def __init__(
        self, shared: SharedState, codec: Codec, own_ttls_ms: tuple[int, int, int] = CACHES_OWN_TTLS_MS
    ) -> None:
        self.shared = shared
        self.codec = codec
        self.use_ttls(own_ttls_ms)

    def use_ttls(self, own_ttls_ms: tuple[int, int, int]) -> None:
        """Set the default TTLs of this object's puts; `Writer` explains the argument."""
        same = len(set(own_ttls_ms)) == 1  # the script parses a single TTL faster than three
        self._own_ttls: int | str = own_ttls_ms[0] if same else "/".join(map(str, own_ttls_ms))

    def chosen_ttl(self, ttl: float | None) -> int | str:
        """Check a user's TTL and return it in ms. If it is None, return the default of this object or of the cache."""
        chosen_ttl = ttl_ms("ttl", ttl)
        return self._own_ttls if chosen_ttl == TIERS_OWN_TTL_MS else chosen_ttl

    def spread(self, chosen_ttl: int | str, freshness: Freshness) -> str:
        """Vary TTLs at random. If a TTL is the cache's default, vary the newest default that this process knows."""
        ttls = chosen_ttl.split("/") if isinstance(chosen_ttl, str) else [chosen_ttl] * 3
        known = zip(map(int, ttls), self.shared.settings.ttls_ms, strict=True)
        return "/".join(str(freshness.spread(own if each == TIERS_OWN_TTL_MS else each)) for each, own in known)

    def put(
        self,
        key: str,
        value: Any,
        ttl: float | None,
        tags: Iterable[str],
        tier: Tier | None = None,
        *,
        if_version: int | None = None,
    ) -> Flow[bool]:
        """Store a value. If a version is given, the present value must have it. Return whether the value was stored."""
        mode = Mode.ALWAYS if if_version is None else Mode.at_version(_checked_version(if_version))
        return self.put_in_mode(mode, key, value, ttl, tags, tier)

    def put_in_mode(
        self, mode: str, key: str, value: Any, ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[bool]:
        """Store a value if the condition of the mode holds. Returns whether it was stored."""
        chosen_ttl = self.chosen_ttl(ttl)
        names = stored_tags(tags)
        data = self.codec.encode(value)
        reply = yield from self.store(key, stored_name(key), data, chosen_ttl, names, tier, mode=mode)
        return reply.outcome is PutResult.STORED

    def touch(self, key: str, ttl: float | None) -> Flow[bool]:
        """Give a value another TTL. Returns whether there was a value."""
        reply = yield from self.store(key, stored_name(key), b"", self.chosen_ttl(ttl), (), None, mode=Mode.TOUCH)
        return reply.outcome is PutResult.STORED

    def increment(self, key: str, by: int, ttl: float | None, tags: Iterable[str], create: bool) -> Flow[int]:
        """Add `by` to a stored number. If there is no value and `create` is True, store `by`. Return the new number."""
        chosen_ttl, names, name = self.chosen_ttl(ttl), stored_tags(tags), stored_name(key)
        number = arguments.count("by", by, minimum=-MAX_INTEGER, maximum=MAX_INTEGER)
        mode = Mode.increment(number, create=arguments.flag("create", create))
        data = self.codec.encode(number)
        if data != _PLAIN.encode(number):  # the script could not read the numbers that this codec stores
            raise InvalidArgument("codec", self.codec, "for incr, a codec that encodes integers as Codec does")
        reply = yield from self.store(key, name, data, chosen_ttl, names, None, mode=mode)
        match reply.outcome:
            case PutResult.STORED:
                return reply.number
            case PutResult.NO_INTEGER:
                raise NoInteger(key, "the stored value is not one")
            case PutResult.OUT_OF_RANGE:
                raise NoInteger(key, "the sum is not one")
            case PutResult.CONDITION_FAILED:
                raise NoInteger(key, "there is no value")
            case PutResult.TOO_LARGE | PutResult.NO_CAPACITY:
                raise InvalidArgument("key", key, "a key that fits into the max_bytes of the cache with its number")
        reason = "the reply was lost, and it is too late to send the request again"
        raise BackendUnavailable(self.shared.backend.address.masked, "unknown", reason)

    def put_many(
        self, values: Mapping[str, Any], ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[StoredCount]:
        """Store several values. Returns how many were stored, and which were refused."""
        chosen_ttl = self.chosen_ttl(ttl)
        names = stored_tags(tags)
        if not isinstance(values, Mapping):
            raise InvalidArgument("values", values, "a mapping of keys to values")
        items = [(key, stored_name(key), self.codec.encode(value)) for key, value in values.items()]
        if not items:
            return StoredCount(0)
        refused = []
        for start in range(0, len(items), commands.MAX_KEYS):
            chunk = items[start : start + commands.MAX_KEYS]
            outcomes = yield from self._put_chunk(chunk, chosen_ttl, names, tier)
            for item, (result, repeated) in zip(chunk, outcomes, strict=True):
                outcome = result
                if result in (PutResult.NO_SETTINGS, PutResult.LATE):
                    outcome = (yield from self.store(*item, chosen_ttl, names, tier, repeated=repeated)).outcome
                if outcome is not PutResult.STORED:
                    refused.append(item[0])
        return StoredCount(len(items) - len(refused), tuple(refused))

    def _put_chunk(
        self, items: list[tuple[str, str, bytes]], chosen_ttl: int | str, tags: tuple[str, ...], tier: Tier | None
    ) -> Flow[list[tuple[PutResult, _Repeated | None]]]:
        """Store encoded values in parallel. The first put to each shard also reports the buffered reads of the shard.

        Returns, for each value, the result, and the request if it must be repeated (else None).
        """
        shared = self.shared
        while True:
            shards: list[Shard] = []
            for _, name, _ in items:
                shards.append((yield from shard_to_write(shared, name)))
            if not any(shard.retired for shard in shards):
                break
        first = {shard: at for at, shard in reversed(list(enumerate(shards)))}
        reports: dict[Shard, AccessReport] = {}
        puts: list[tuple[str, Command[PutReply]]] = []
        confirmed: set[Shard] = set()
        until_ms: dict[Shard, int] = {}
        seen = {shard: shard.seen for shard in first}
        try:
            for shard in first:
                reports[shard], _ = yield from _next_report(shard, None)
            until_ms = {shard: shard.until_ms() for shard in first}
            for at, (shard, item) in enumerate(zip(shards, items, strict=True)):
                report = reports[shard] if first[shard] == at else NO_REPORT
                puts.append(self._put_command(shard, *item, chosen_ttl, tags, tier, until_ms[shard], report))
            replies = yield from Batch(tuple(command for _, command in puts)).settled()
            stored = [isinstance(each, PutReply) and each.outcome is PutResult.STORED for each in replies]
            confirmed = {shard for shard, at in first.items() if stored[at]}
        except BaseException as error:
            for of in until_ms:
                requests = tuple(request for shard, (request, _) in zip(shards, puts, strict=False) if shard is of)
                yield from cancel_requests(of, error, requests, until_ms[of])
            raise
        finally:
            for shard, report in reports.items():
                shard.access_buffer.settle(report, confirmed=shard in confirmed, unused=not puts)
            for _, name, _ in items:
                shared.changed(name)
        outcomes = []
        for shard, reply, (request, _) in zip(shards, replies, puts, strict=True):
            if isinstance(reply, AgentPerfError):
                raise reply
            shard.learn(reply.version if reply.outcome is PutResult.STORED else 0)
            outcomes.append((reply.outcome, (request, seen[shard]) if reply.repeated else None))
        return outcomes

    def store(
        self,
        key: str,
        name: str,
        data: bytes,
        chosen_ttl_ms: int | str,
        tags: tuple[str, ...],
        tier: Tier | None,
        *,
        token: str = "",
        cost_ms: int = 0,
        fresh_ms: int = 0,
        mode: str = Mode.ALWAYS,
        repeated: _Repeated | None = None,
    ) -> Flow[PutReply]:
        """Store an encoded value. A computed value has the `token` of its lease and a computing time, `cost_ms`.

        `repeated` is a request that was sent before and may have been executed; None sends a new request.
        """
        shared, waited = self.shared, None
        request, seen = repeated or (entry_format.new_request(), None)
        again = repeated is not None
        for _ in range(ATTEMPTS):
            shard = yield from shard_to_write(shared, name)
            seen = shard.seen if seen is None else seen
            access_buffer = shard.access_buffer
            report, waited = yield from _next_report(shard, waited)
            sent_at, until_ms = time.monotonic(), shard.until_ms()
            confirmed = unused = False
            try:
                reply = yield from commands.put(
                    shard.keys,
                    name,
                    entry_format.payload(request, cost_ms, fresh_ms, tags, data, key, name),
                    request,
                    until_ms=until_ms,
                    seen=seen,
                    again=again,
                    ttl_ms=chosen_ttl_ms,
                    tier=tier,
                    token=token,
                    origin=shared.origin,
                    writer=access_buffer.writer,
                    report=report,
                    tags=tags,
                    mode=mode,
                )
                # If the put fails, its report is sent again later. The report's sequence number makes the repetition
                # idempotent.
                confirmed, unused = reply.outcome is PutResult.STORED, reply.outcome in _NOTHING_DONE
            except BaseException as error:
                # A put with a token need not be cancelled. Any later write of the key ends the lease, so a late copy of
                # the put is refused.
                if not token:
                    yield from cancel_requests(shard, error, (request,), until_ms)
                raise
            finally:
                access_buffer.settle(report, confirmed=confirmed, unused=unused)
                shared.changed(name, computed=bool(token))
            if reply.outcome is PutResult.NO_SETTINGS:
                shard.lose_settings()
                # Mark the next delivery as a repetition in two cases. First, an earlier copy may have been executed
                # before the entries moved. Second, the mode is not ALWAYS. The server may then refuse the next
                # delivery. Only for a repetition does it store the refusal, so that late copies are refused too.
                again = again or reply.repeated or mode != Mode.ALWAYS
            elif reply.outcome is PutResult.LATE:
                shard.set_clock(reply.version, sent_at)
                again = True  # an earlier copy of the request may have been executed
            else:
                shard.learn(reply.version)
                if reply.version:
                    shard.set_clock(reply.version * 1000 / entry_format.CLOCK_PER_S, sent_at)
                return reply
        return PutReply(PutResult.LATE)

    def _put_command(
        self,
        shard: Shard,
        key: str,
        name: str,
        data: bytes,
        chosen_ttl_ms: int | str,
        tags: tuple[str, ...],
        tier: Tier | None,
        until_ms: int,
        report: AccessReport,
    ) -> tuple[str, Command[commands.PutReply]]:
        request = entry_format.new_request()
        return request, commands.put(
            shard.keys,
            name,
            entry_format.payload(request, 0, 0, tags, data, key, name),
            request,
            until_ms=until_ms,
            seen=shard.seen,
            again=False,
            ttl_ms=chosen_ttl_ms,
            tier=tier,
            token="",
            origin=self.shared.origin,
            writer=shard.access_buffer.writer,
            report=report,
            tags=tags,
        )


def _next_report(shard: Shard, waited: WakeUp | None) -> Flow[tuple[AccessReport, WakeUp | None]]:
    """Return the report that the next put carries, and the most recent report that was waited for; see `under_way`."""
    access_buffer = shard.access_buffer
    waited = yield from under_way(shard, waited)  # earlier reads are reported first, to keep the order exact
    if access_buffer.is_full:
        yield from flush(shard, waited)
    report = access_buffer.take()
    if report is NO_REPORT and access_buffer.flushing not in (None, waited):  # a flush has just begun
        waited = yield from under_way(shard, waited)
        report = access_buffer.take()
    return report, waited


def _checked_version(if_version: object) -> int:
    """Check the version that a value must have to be replaced; 0 means that there must be no value."""
    try:
        return arguments.count("if_version", if_version, minimum=0, maximum=entry_format.MAX_VERSION)
    except InvalidArgument:
        allowed = "the version of an entry, 0 for no value, or None for any"
        raise InvalidArgument("if_version", if_version, allowed) from None
