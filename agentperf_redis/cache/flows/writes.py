"""Stores values. A put is executed at most once, no matter how late or how often it is delivered; see `put.lua`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.commands.entries import Mode, PutReply, PutResult
from agentperf_redis.cache.flows.access_reports import flush, under_way
from agentperf_redis.cache.flows.cancelling import cancel_requests
from agentperf_redis.cache.flows.settings import ATTEMPTS, ready
from agentperf_redis.cache.freshness import Freshness
from agentperf_redis.cache.model import CACHES_OWN_TTLS_MS, TIERS_OWN_TTL_MS, StoredCount, Tier, ttl_ms
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument, NoInteger

MAX_INTEGER = 2**53 - 1
"""Maximum of the numbers that `incr` adds and stores: up to here, every integer is an exact double in Lua."""
_PLAIN = Codec()
_NOTHING_DONE = (PutResult.CONDITION_FAILED, PutResult.NO_INTEGER, PutResult.OUT_OF_RANGE)


class Writer:
    """Puts of one cache object.

    Args:
        shared: the state shared with other objects of the same cache.
        codec: encodes and decodes values.
        own_ttls_ms: TTLs of entries that this object puts into hot, warm and cold; below 0: the cache's default.
    """

    def __init__(
        self, shared: SharedState, codec: Codec, own_ttls_ms: tuple[int, int, int] = CACHES_OWN_TTLS_MS
    ) -> None:
        self.shared = shared
        self.codec = codec
        self.use_ttls(own_ttls_ms)

    def use_ttls(self, own_ttls_ms: tuple[int, int, int]) -> None:
        """Set the default TTLs of this object's puts; `Writer` explains the argument."""
        self._own_ttls = None if own_ttls_ms == CACHES_OWN_TTLS_MS else "/".join(map(str, own_ttls_ms))

    def chosen_ttl(self, ttl: float | None) -> int | str:
        """Check a user's TTL and return it in ms. If it is None, return the default of this object or of the cache."""
        chosen_ttl = ttl_ms("ttl", ttl)
        return self._own_ttls if chosen_ttl == TIERS_OWN_TTL_MS and self._own_ttls else chosen_ttl

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
        """Store a value. If a version is given, the present value must have it. Returns whether it was stored."""
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
        """Add to a stored number, or store the number if there is no value. Returns the new number."""
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
        # The first put deploys the settings and carries the report of reads. The other puts need neither.
        first, *rest = items
        refused = []
        if (yield from self.store(*first, chosen_ttl, names, tier)).outcome is not PutResult.STORED:
            refused.append(first[0])
        for start in range(0, len(rest), commands.MAX_KEYS):
            chunk = rest[start : start + commands.MAX_KEYS]
            until_ms = self.shared.until_ms()
            puts = [self._put_command(*item, chosen_ttl, names, tier, until_ms) for item in chunk]
            batch = tuple(command for _, command in puts)
            try:
                replies = yield from Batch(batch)
            except BaseException as error:
                yield from cancel_requests(self.shared, error, tuple(request for request, _ in puts), until_ms)
                raise
            finally:
                for _, name, _ in chunk:
                    self.shared.changed(name)
            for item, reply in zip(chunk, replies, strict=True):
                outcome = reply.outcome
                if outcome in (PutResult.NO_SETTINGS, PutResult.LATE):
                    outcome = (yield from self.store(*item, chosen_ttl, names, tier)).outcome
                self.shared.learn(reply.version if outcome is PutResult.STORED else 0)
                if outcome is not PutResult.STORED:
                    refused.append(item[0])
        return StoredCount(len(items) - len(refused), tuple(refused))

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
    ) -> Flow[PutReply]:
        """Store an encoded value. A computed value has the `token` of its lease and a computing time, `cost_ms`."""
        shared, access_buffer = self.shared, self.shared.access_buffer
        request, seen, again, waited = entry_format.new_request(key, name), shared.seen, False, None
        for _ in range(ATTEMPTS):
            yield from ready(shared)
            waited = yield from under_way(shared, waited)  # earlier reads are reported first, to keep the order exact
            if access_buffer.is_full:
                yield from flush(shared, waited)
            report = access_buffer.take()
            if report is NO_REPORT and access_buffer.flushing not in (None, waited):  # a flush has just begun
                waited = yield from under_way(shared, waited)
                report = access_buffer.take()
            sent_at, until_ms = time.monotonic(), shared.until_ms()
            confirmed = unused = False
            try:
                reply = yield from commands.put(
                    shared.keys,
                    name,
                    entry_format.payload(request, cost_ms, fresh_ms, tags, data, key),
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
                # A report whose result is unknown is sent again. Its sequence number makes that idempotent.
                confirmed, unused = reply.outcome is PutResult.STORED, reply.outcome in _NOTHING_DONE
            except BaseException as error:
                # A put with a token need not be cancelled. Any later write of the key ends the lease, so a late copy of
                # the put is refused.
                if not token:
                    yield from cancel_requests(shared, error, (request,), until_ms)
                raise
            finally:
                access_buffer.settle(report, confirmed=confirmed, unused=unused)
                shared.changed(name, computed=bool(token))
            if reply.outcome is PutResult.NO_SETTINGS:
                shared.deployed = False
                again = again or mode != Mode.ALWAYS  # an earlier copy may be under way: a refusal must bind it
            elif reply.outcome is PutResult.LATE:
                shared.set_clock(reply.version, sent_at)
                again = True  # an earlier copy of the request may have been executed
            else:
                shared.learn(reply.version)
                if reply.version:
                    shared.set_clock(reply.version * 1000 / entry_format.CLOCK_PER_S, sent_at)
                return reply
        return PutReply(PutResult.LATE)

    def _put_command(
        self,
        key: str,
        name: str,
        data: bytes,
        chosen_ttl_ms: int | str,
        tags: tuple[str, ...],
        tier: Tier | None,
        until_ms: int,
    ) -> tuple[str, Command[commands.PutReply]]:
        shared = self.shared
        request = entry_format.new_request(key, name)
        return request, commands.put(
            shared.keys,
            name,
            entry_format.payload(request, 0, 0, tags, data, key),
            request,
            until_ms=until_ms,
            seen=shared.seen,
            again=False,
            ttl_ms=chosen_ttl_ms,
            tier=tier,
            token="",
            origin=shared.origin,
            writer=shared.access_buffer.writer,
            report=NO_REPORT,
            tags=tags,
        )


def _checked_version(if_version: object) -> int:
    """Check the version that a value must have to be replaced; 0 is no value."""
    try:
        return arguments.count("if_version", if_version, minimum=0, maximum=entry_format.MAX_VERSION)
    except InvalidArgument:
        allowed = "the version of an entry, 0 for no value, or None for any"
        raise InvalidArgument("if_version", if_version, allowed) from None
