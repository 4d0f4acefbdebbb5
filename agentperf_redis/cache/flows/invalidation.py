"""Invalidates or removes entries (one key, a tag, or all) and frees the memory of invalidated ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks, distinct_keys, stored_name, stored_tags
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.cancelling import cancel_requests
from agentperf_redis.cache.flows.reads import MISSING, Reader
from agentperf_redis.cache.flows.settings import ATTEMPTS, at_once, grouped, pull_keys, ready, shard_to_write
from agentperf_redis.cache.process.shard import InvalidationScope, PendingInvalidation, Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Request(Generic[T]):
    """A command that invalidates entries of one shard, and what stays pending if this shard cannot be reached."""

    shard: Shard
    command: Command[T]
    pending: tuple[PendingInvalidation, ...]


class Eraser:
    """Deletions and invalidations of one cache object.

    An invalidation that fails because the server does not answer stays pending: this process sends it before its next
    read or write of the shards that it did not reach. The invalidation is acknowledged once all shards concerned have
    received it.

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
        for _ in range(ATTEMPTS):
            lost: list[str] = []
            while names:
                count = at_once(self.shared)
                sent, names = names[:count], names[count:]
                try:
                    for request, reply in (yield from self._invalidate(partial(self._deletions, sent))):
                        if isinstance(reply, NoSettings):
                            request.shard.lose_settings()
                            lost += [name for _, name in request.pending]
                        else:
                            removed += reply[0]
                            request.shard.learn(reply[1])
                except BackendUnavailable:
                    for name in (*names, *lost):
                        self.shared.shard(name).add_pending([(InvalidationScope.KEY, name)])
                    raise
                finally:
                    for name in sent:
                        self.shared.changed(name)
            if not lost:
                return removed
            names = lost
        raise CorruptState(self.shared.keys.meta, "a layout that changes all the time")

    def _deletions(self, names: list[str]) -> list[_Request[tuple[int, int] | NoSettings]]:
        return [
            _Request(
                shard,
                commands.delete(shard.keys, chunk, self.shared.origin),
                tuple((InvalidationScope.KEY, name) for name in chunk),
            )
            for shard, chunk in grouped(self.shared, names)
        ]

    def _invalidate(self, divide: Callable[[], list[_Request[T]]]) -> Flow[list[tuple[_Request[T], T]]]:
        """Send invalidations to several shards in parallel. Invalidations without an answer stay pending.

        Args:
            divide: returns the requests for the present shards; called again if the layout changes.

        Returns:
            The requests and their results. If any request fails, the first error is raised after all were sent.
        """
        while True:
            requests, shards, errors = divide(), self.shared.shards, dict[Shard, AgentPerfError]()
            for shard in dict.fromkeys(request.shard for request in requests):
                try:
                    yield from ready(shard)
                except AgentPerfError as error:  # the other shards still get the invalidation
                    errors[shard] = error
            if shards[0].old:
                pending = [each for request in requests for each in request.pending if request.shard not in errors]
                names = [name for scope, name in pending if scope is InvalidationScope.KEY]
                try:
                    yield from pull_keys(self.shared, names)
                except BackendUnavailable:
                    for request in requests:
                        request.shard.add_pending(request.pending)
                    raise
            if shards is self.shared.shards:
                break
        sent = [request for request in requests if request.shard not in errors]
        results = yield from Batch(tuple(request.command for request in sent)).settled()
        answered = []
        for request, result in zip(sent, results, strict=True):
            if isinstance(result, AgentPerfError):
                errors[request.shard] = result
            else:
                answered.append((request, result))
        refused = {request.shard for request, result in answered if isinstance(result, NoSettings)}
        for request in requests:
            unsent = errors and request.shard in refused
            if unsent or isinstance(errors.get(request.shard), BackendUnavailable):
                request.shard.add_pending(request.pending)  # repeating a completed invalidation is harmless
        if errors:
            raise next(iter(errors.values()))
        return answered

    def _invalidate_everywhere(
        self, divide: Callable[[], list[_Request[T | NoSettings]]]
    ) -> Flow[list[tuple[_Request[T | NoSettings], T]]]:
        """Invalidate as `_invalidate` does. If a shard refuses because the layout has changed, use the new layout."""
        for _ in range(ATTEMPTS):
            answered = yield from self._invalidate(divide)
            done = [(request, result) for request, result in answered if not isinstance(result, NoSettings)]
            if len(done) == len(answered):
                return done
            for request, _ in answered:
                request.shard.lose_settings()
        raise CorruptState(self.shared.keys.meta, "a layout that changes all the time")

    def delete(self, key: str) -> Flow[bool]:
        """Remove one entry. Returns whether there was one."""
        stored_name(key)  # checked here so that an error names `key`, the argument of this method
        removed = yield from self.delete_many((key,))
        return removed > 0

    def pop(self, key: str, default: Any) -> Flow[Any]:
        """Remove one entry and return its value, or the default."""
        name, shared, again = stored_name(key), self.shared, False
        request, seen = entry_format.new_request(), None
        for _ in range(ATTEMPTS):
            shard = yield from shard_to_write(shared, name)
            seen = shard.seen if seen is None else seen
            sent_at, until_ms = time.monotonic(), shard.until_ms()
            try:
                reply = yield from commands.pop(
                    *(shard.keys, name, request), until_ms=until_ms, again=again, seen=seen, origin=shared.origin
                )
            except BaseException as error:
                yield from cancel_requests(shard, error, (request,), until_ms)
                raise
            finally:
                shared.changed(name)
            match reply.outcome:
                case PutResult.NO_SETTINGS:
                    shard.lose_settings()
                    again = True  # an earlier copy of the request may still arrive
                case PutResult.LATE:
                    shard.set_clock(reply.version, sent_at)
                    again = True
                case PutResult.STORED:
                    shard.learn(reply.version)
                    value, _ = yield from self.reader.value(shard, name, (reply.entry, None), counted=True)
                    return default if value is MISSING else value
                case PutResult.CONDITION_FAILED:
                    shard.access_buffer.missed()
                    return default
                case _:
                    break
        reason = "the reply was lost, and it is too late to send the request again"
        raise BackendUnavailable(shared.backend.address.masked, "unknown", reason)

    def clear(self) -> Flow[None]:
        """Make every entry a miss."""
        shared, pending = self.shared, ((InvalidationScope.ALL, ""),)
        try:
            cleared = yield from self._invalidate_everywhere(
                lambda: [_Request(each, commands.clear(each.keys, shared.origin), pending) for each in shared.shards]
            )
        finally:
            shared.flights.detach_all()
            if shared.local is not None:
                shared.local.flush()
        for request, (_, version) in cleared:
            request.shard.learn(version)

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Invalidate every entry with one of the tags."""
        names, shared = stored_tags(tags), self.shared
        pending = tuple((InvalidationScope.TAG, tag) for tag in names)
        for chunk in chunks(list(names)):
            try:
                divide = partial(self._tag_invalidations, tuple(chunk), pending)
                invalidated = yield from self._invalidate_everywhere(divide)
            finally:
                shared.flights.detach_all()  # all flights: the tags of their values are not known yet
                for tag in chunk:
                    if shared.local is not None:
                        shared.local.drop_tag(tag)
            for request, version in invalidated:
                request.shard.learn(version)

    def _tag_invalidations(
        self, tags: tuple[str, ...], pending: tuple[PendingInvalidation, ...]
    ) -> list[_Request[int | NoSettings]]:
        return [
            _Request(shard, commands.invalidate_tags(shard.keys, tags, self.shared.origin), pending)
            for shard in self.shared.shards
        ]

    def sweep(self) -> Flow[int]:
        """Remove what is left of expired, cleared, evicted and invalidated entries; return the number of entries."""
        total = 0
        while True:
            shards = self.shared.shards
            for shard in shards:
                yield from ready(shard)
            if shards is self.shared.shards:
                break
        cursors = dict.fromkeys(shards, "0")
        while cursors:
            steps = yield from Batch(tuple(commands.sweep(shard.keys, cursor) for shard, cursor in cursors.items()))
            for shard, swept in zip(list(cursors), steps, strict=True):
                if isinstance(swept, NoSettings):
                    del cursors[shard]
                    continue
                total += swept.expired + swept.freed + swept.orphans + swept.evicted
                cursors[shard] = swept.cursor
                if swept.cursor == "0" and not swept.more:
                    del cursors[shard]
        return total
