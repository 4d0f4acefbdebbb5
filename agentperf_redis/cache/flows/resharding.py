"""Changes the number of shards of a cache in use; `flows.layouts` explains how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.layouts import (
    CLOSED_KEPT_MS,
    HEADROOM,
    exchanged,
    make_room,
    move,
    related_shards,
    release_limits,
)
from agentperf_redis.cache.model import Settings, checked_shards
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.keys import CacheKeys

_PAGE: Final = 100
"""Approximate number of entries that one step moves. Each script of the step blocks its server for about 1 ms."""
_MAX_BYTES: Final = 2**20
"""Maximum bytes of the entries that are moved together, unless a single entry is larger."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a change.

    Attributes:
        source: number of shards of the old layout.
        target: number of shards of the new layout.
        left: entries that are still in the old layout.
        done: whether the change has ended.
    """

    source: int
    target: int
    left: int
    done: bool = False


class Resharding:
    """A change of the number of shards. If it is interrupted, even by a kill, the next such change continues it.

    Call `begin`, and then `step` until its result is `done`. Several processes may do so at the same time.

    Args:
        backend: the server and namespace.
        service: "cache" or "tiered".
        name: name of the cache.
        shards: new number of shards of the cache.

    Raises:
        InvalidArgument: no cache can have this number of shards.
    """

    def __init__(self, backend: Backend, service: str, name: str, shards: int) -> None:
        self.target = checked_shards(shards)
        self._backend, self._service, self._name = backend, service, name
        self._own = key_names.cache(backend.namespace, service, name)
        self._settings: Settings | None = None
        self._new: Sequence[CacheKeys] = ()
        self._old: Sequence[CacheKeys] = ()
        self._at, self._cursor = 0, "0"
        self._left: list[int] = []

    def begin(self) -> Flow[Progress | None]:
        """Exchange the layouts, unless that was done before. Returns None if there is no such cache.

        Raises:
            InvalidArgument: another change is not finished, or the limits are too small for so many shards.
        """
        stored = yield from commands.stored_settings(self._own)
        if not isinstance(stored, Settings):
            return None
        if not (stored.target or stored.source):
            if stored.shards == self.target:
                return Progress(stored.shards, self.target, 0, done=True)
            replace(stored.own, shards=self.target).check_shards(self._service)
            where = key_names.cache_shards(
                *(self._backend.namespace, self._service, self._name, stored.shards, stored.layout)
            )
            coming = key_names.cache_shards(
                *(self._backend.namespace, self._service, self._name, self.target, stored.layout + 1)
            )
            # This request changes nothing, but raises if a node does not answer. After the old shards are closed, an
            # unreachable node would stop the cache.
            yield from Batch(tuple(commands.forget(each, ()) for each in coming))
            yield from make_room(where, stored, self.target)
            begun = yield from commands.relayout(self._own, "begin", self.target, stored.layout)
            if isinstance(begun, NoSettings):
                return None
            stored = begun
        if (stored.target or stored.shards) != self.target:
            other = stored.target or stored.shards
            raise InvalidArgument("shards", self.target, f"{other}: the change to {other} is not finished")
        settings = yield from exchanged(self._backend, self._service, self._name)
        if settings is None:
            return None
        if not settings.source:  # another process has finished the change
            return Progress(stored.shards, self.target, 0, done=True)
        space, layout = self._backend.namespace, settings.layout
        self._settings = settings
        self._new = key_names.cache_shards(space, self._service, self._name, settings.shards, layout)
        self._old = key_names.cache_shards(space, self._service, self._name, settings.source, layout - 1)
        left = yield from Batch(tuple(commands.forget(where, ()) for where in self._old))
        self._left = [entries for entries, _, _ in left]
        return self._progress()

    def _progress(self, *, done: bool = False) -> Progress:
        return Progress(len(self._old), len(self._new), sum(self._left), done)

    def step(self) -> Flow[Progress]:
        """Move about a hundred entries, or end the change."""
        assert self._settings is not None  # noqa: S101  `begin` has set it
        if self._at == len(self._old):
            return (yield from self._end())
        where = self._old[self._at]
        self._cursor, page = yield from inspection.sizes_page(where, self._cursor, _PAGE)
        concerned = related_shards(self._at, len(self._old), len(self._new))
        for names in _portions(page, *self._room(concerned)):
            yield from move(self._settings, self._new, self._old, names)
            yield from release_limits(self._new, self._old, concerned)
        entries, _, cleared = yield from commands.forget(where, ())
        self._left[self._at] = entries
        if self._cursor == "0" and not entries and not cleared:
            self._at += 1
        return self._progress()

    def _room(self, concerned: Sequence[int]) -> tuple[int, int]:
        """Return how many entries and bytes to move at a time: half of the room that `make_room` made, with a cap."""
        assert self._settings is not None  # noqa: S101
        shares = [self._settings.own.of_shard(at) for at in concerned]
        entries = sum(sum(share.capacities) for share in shares) // (2 * HEADROOM)
        size = sum(share.max_bytes for share in shares) // (2 * HEADROOM) or _MAX_BYTES
        return max(1, min(_PAGE, entries)), min(_MAX_BYTES, size)

    def _end(self) -> Flow[Progress]:
        yield from Batch(tuple(commands.lower(where, None) for where in self._new))
        left = yield from Batch(tuple(commands.retire(where, CLOSED_KEPT_MS) for where in self._old))
        if any(left):  # not expected: a closed shard gets no entries
            self._at = 0
            return self._progress()
        assert self._settings is not None  # noqa: S101
        yield from commands.relayout(self._own, "settle", self.target, self._settings.layout - 1)
        return self._progress(done=True)


def _portions(page: list[tuple[str, tuple[int, int]]], entries: int, max_bytes: int) -> Iterator[list[str]]:
    """Divide a page into parts within these limits of entries and bytes. A single entry may have more bytes."""
    names: list[str] = []
    total = 0
    for name, (_, size) in page:
        if names and (total + size > max_bytes or len(names) == entries):
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names
