"""Invalidates or removes entries (one key, a tag, or all) and frees the memory of invalidated ones."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks, distinct_keys, stored_name, stored_tags
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.cancelling import cancel_requests
from agentperf_redis.cache.flows.reads import MISSING, Reader
from agentperf_redis.cache.flows.settings import ATTEMPTS, ready
from agentperf_redis.cache.process.shared_state import InvalidationScope, SharedState
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable


class Eraser:
    """Deletions and invalidations of one cache object.

    An invalidation that fails because the server does not answer stays pending: this process sends it before its next
    read or write.

    Args:
        reader: the object's reader.
    """

    def __init__(self, reader: Reader) -> None:
        self.shared: SharedState = reader.shared
        self.reader = reader

    def delete_many(self, keys: Iterable[str]) -> Flow[int]:
        """Remove entries. Returns how many existed."""
        names = list(dict.fromkeys(map(stored_name, distinct_keys(keys))))
        removed = 0
        for chunk in chunks(names):
            for _ in range(ATTEMPTS):
                try:
                    yield from ready(self.shared)
                    reply = yield from commands.delete(self.shared.keys, chunk, self.shared.origin)
                except BackendUnavailable:
                    self.shared.add_pending(
                        (InvalidationScope.KEY, name) for name in names
                    )  # repeating a completed deletion is harmless
                    raise
                finally:
                    for name in chunk:
                        self.shared.changed(name)
                if not isinstance(reply, NoSettings):
                    removed += reply[0]
                    self.shared.learn(reply[1])
                    break
                self.shared.deployed = False
        return removed

    def delete(self, key: str) -> Flow[bool]:
        """Remove one entry. Returns whether there was one."""
        stored_name(key)  # checked here so that an error names `key`, the argument of this method
        removed = yield from self.delete_many((key,))
        return removed > 0

    def pop(self, key: str, default: Any) -> Flow[Any]:
        """Remove one entry and return its value, or the default."""
        name, shared, again = stored_name(key), self.shared, False
        request, seen = entry_format.new_request(name, name), shared.seen
        for _ in range(ATTEMPTS):
            yield from ready(shared)
            sent_at, until_ms = time.monotonic(), shared.until_ms()
            try:
                reply = yield from commands.pop(
                    *(shared.keys, name, request), until_ms=until_ms, again=again, seen=seen, origin=shared.origin
                )
            except BaseException as error:
                yield from cancel_requests(shared, error, (request,), until_ms)
                raise
            finally:
                shared.changed(name)
            match reply.outcome:
                case PutResult.NO_SETTINGS:
                    shared.deployed, again = False, True  # an earlier copy may be under way
                case PutResult.LATE:
                    shared.set_clock(reply.version, sent_at)
                    again = True
                case PutResult.STORED:
                    shared.learn(reply.version)
                    value, _ = yield from self.reader.value(name, (reply.entry, None), counted=True)
                    return default if value is MISSING else value
                case PutResult.CONDITION_FAILED:
                    shared.access_buffer.missed()
                    return default
                case _:
                    break
        reason = "the reply was lost, and it is too late to send the request again"
        raise BackendUnavailable(shared.backend.address.masked, "unknown", reason)

    def clear(self) -> Flow[None]:
        """Make every entry a miss."""
        try:
            yield from ready(self.shared)
            _, version = yield from commands.clear(self.shared.keys, self.shared.origin)
        except BackendUnavailable:
            self.shared.add_pending([(InvalidationScope.ALL, "")])
            raise
        finally:
            self.shared.flights.detach_all()
            if self.shared.local is not None:
                self.shared.local.flush()
        self.shared.learn(version)

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Invalidate every entry with one of the tags."""
        names = stored_tags(tags)
        for chunk in chunks(list(names)):
            try:
                yield from ready(self.shared)
                version = yield from commands.invalidate_tags(self.shared.keys, tuple(chunk), self.shared.origin)
            except BackendUnavailable:
                self.shared.add_pending((InvalidationScope.TAG, tag) for tag in names)
                raise
            finally:
                self.shared.flights.detach_all()  # the tags of the values being computed are not known yet
                for tag in chunk:
                    if self.shared.local is not None:
                        self.shared.local.drop_tag(tag)
            self.shared.learn(version)

    def sweep(self) -> Flow[int]:
        """Remove entries that are expired, cleared, dropped by the server, or invalidated by tag; return the number."""
        total, cursor = 0, "0"
        yield from ready(self.shared)
        while True:
            swept = yield from commands.sweep(self.shared.keys, cursor)
            if isinstance(swept, NoSettings):
                return total
            total += swept.expired + swept.freed + swept.orphans + swept.evicted
            cursor = swept.cursor
            if cursor == "0" and not swept.more:
                return total
