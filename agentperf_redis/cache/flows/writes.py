"""Puts: each executed at most once, however late or often its request is delivered; see the script put."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.commands.entries import PutOutcome
from agentperf_redis.cache.flows.access_reports import flush, under_way
from agentperf_redis.cache.flows.settings import ATTEMPTS, ready
from agentperf_redis.cache.freshness import Freshness
from agentperf_redis.cache.model import CACHES_OWN_TTLS_MS, TIERS_OWN_TTL_MS, Tier, ttl_ms
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.cache.process.shared_state import Binding
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import AgentPerfError, InvalidArgument


class Writer:
    """Puts of one cache object.

    Args:
        binding: what it shares with other objects of the same cache.
        codec: turns values into bytes.
        own_ttls_ms: lives of entries put into hot, warm, cold by this object; below 0 is the cache's.
    """

    def __init__(self, binding: Binding, codec: Codec, own_ttls_ms: tuple[int, int, int] = CACHES_OWN_TTLS_MS) -> None:
        self.binding = binding
        self.codec = codec
        self._own_ttls = None if own_ttls_ms == CACHES_OWN_TTLS_MS else "/".join(map(str, own_ttls_ms))

    def life(self, ttl: float | None) -> int | str:
        """Check a life given by a user; this object's own if he gave none."""
        life = ttl_ms("ttl", ttl)
        return self._own_ttls if life == TIERS_OWN_TTL_MS and self._own_ttls else life

    def spread(self, life: int | str, freshness: Freshness) -> str:
        """Make lives longer or shorter at random; those that are the cache's are taken as they were last known here."""
        lives = life.split("/") if isinstance(life, str) else [life] * 3
        known = zip(map(int, lives), self.binding.settings.ttls_ms, strict=True)
        return "/".join(str(freshness.spread(own if each == TIERS_OWN_TTL_MS else each)) for each, own in known)

    def put(self, key: str, value: Any, ttl: float | None, tags: Iterable[str], tier: Tier | None = None) -> Flow[bool]:
        """Store a value. Returns whether it was stored."""
        life = self.life(ttl)
        names = stored_tags(tags)
        reply = yield from self.store(stored_name(key), self.codec.encode(value), life, names, tier)
        return reply is PutOutcome.STORED

    def put_many(
        self, values: Mapping[str, Any], ttl: float | None, tags: Iterable[str], tier: Tier | None = None
    ) -> Flow[int]:
        """Store several values. Returns how many were stored."""
        life = self.life(ttl)
        names = stored_tags(tags)
        if not isinstance(values, Mapping):
            raise InvalidArgument("values", values, "a mapping of keys to values")
        items = [(stored_name(key), self.codec.encode(value)) for key, value in values.items()]
        if not items:
            return 0
        # the first one brings the settings and the report along; the others need neither
        first, *rest = items
        stored = int((yield from self.store(*first, life, names, tier)) is PutOutcome.STORED)
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
                    self.binding.changed(name)
            for (name, data), reply in zip(chunk, replies, strict=True):
                outcome = reply.outcome
                if outcome in (PutOutcome.NO_SETTINGS, PutOutcome.LATE):
                    outcome = yield from self.store(name, data, life, names, tier)
                self.binding.learn(reply.version if outcome is PutOutcome.STORED else 0)
                stored += outcome is PutOutcome.STORED
        return stored

    def store(
        self,
        name: str,
        data: bytes,
        life_ms: int | str,
        tags: tuple[str, ...],
        tier: Tier | None,
        *,
        token: str = "",
        cost_ms: int = 0,
        fresh_ms: int = 0,
    ) -> Flow[PutOutcome]:
        """Store the bytes of a value; with the token of a lease if it was computed under one, and what that took."""
        binding, outbox = self.binding, self.binding.outbox
        request, seen, again, waited = secrets.token_urlsafe(9), binding.seen, False, None
        for _ in range(ATTEMPTS):
            yield from ready(binding)
            waited = yield from under_way(binding, waited)  # touches come before this put, so that the order is exact
            if outbox.is_full:
                yield from flush(binding, waited)
            report = outbox.take()
            if report is NO_REPORT and outbox.flushing not in (None, waited):  # begun just now
                waited = yield from under_way(binding, waited)
                report = outbox.take()
            asked_at, taken_in, until_ms = time.monotonic(), False, self._until_ms()
            try:
                reply = yield from commands.put(
                    binding.keys,
                    name,
                    entry_format.payload(request, cost_ms, fresh_ms, tags, data),
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
                binding.changed(name, computed=bool(token))
            if reply.outcome is PutOutcome.NO_SETTINGS:
                binding.deployed = False
            elif reply.outcome is PutOutcome.LATE:
                binding.set_clock(reply.version, asked_at)
                again = True  # an earlier copy of it may have been executed
            else:
                binding.learn(reply.version)
                if reply.version:
                    binding.set_clock(reply.version * 1000 / entry_format.CLOCK_PER_S, asked_at)
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
                yield from commands.cancel_puts(self.binding.keys, requests, until_ms)

    def _put_command(
        self, name: str, data: bytes, life_ms: int | str, tags: tuple[str, ...], tier: Tier | None, until_ms: int
    ) -> tuple[str, Command[commands.PutReply]]:
        binding = self.binding
        request = secrets.token_urlsafe(9)
        return request, commands.put(
            binding.keys,
            name,
            entry_format.payload(request, 0, 0, tags, data),
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
