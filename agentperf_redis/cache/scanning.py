"""Iterators over the keys of a cache. They read one page at a time, so that a cache of any size can be scanned."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from fnmatch import translate

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.flows import inspection
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument

DEFAULT_BATCH = 250
_MAX_BATCH = 10_000


class KeyPages:
    """The pages of a scan. The next page is read when all keys of the current page have been consumed.

    This process compares the keys with the pattern, because a server that matches a long pattern would block.

    Args:
        shared: the state of the cache in this process.
        match: a pattern as for `fnmatch.fnmatchcase`; None for every key.
        batch: keys that the server examines at a time.
    """

    def __init__(self, shared: SharedState, match: str | None, batch: int) -> None:
        if match is not None and not isinstance(match, str):
            raise InvalidArgument("match", match, "a pattern with *, ? and [...], or None")
        self._shared = shared
        self._pattern = None if match is None else re.compile(translate(match))
        self._batch = arguments.count("batch", batch, maximum=_MAX_BATCH)
        self._cursor: inspection.Cursor | None = inspection.FIRST_PAGE
        self.found: deque[str] = deque()
        """Keys that have been read but not yet returned."""
        self.ended = False

    def read(self) -> Flow[None]:
        """Read a page. If there is none left, set `ended`."""
        if self._cursor is not None:
            self._cursor, keys = yield from inspection.page(self._shared, self._cursor, self._batch)
            self.found += [key for key in keys if self._pattern is None or self._pattern.match(key)]
        self.ended = self._cursor is None


class KeyScan(Iterator[str]):
    """Keys of a cache, read in pages. `LRUCache.scan` returns it."""

    def __init__(self, backend: Backend, pages: KeyPages) -> None:
        self._backend = backend
        self._pages = pages

    def __next__(self) -> str:
        while not self._pages.found:
            if self._pages.ended:
                raise StopIteration
            self._backend.run(self._pages.read())
        return self._pages.found.popleft()


class AsyncKeyScan(AsyncIterator[str]):
    """Keys of a cache, read in pages. `LRUCache.aio.scan` returns it."""

    def __init__(self, backend: Backend, pages: KeyPages) -> None:
        self._backend = backend
        self._pages = pages

    async def __anext__(self) -> str:
        while not self._pages.found:
            if self._pages.ended:
                raise StopAsyncIteration
            await self._backend.arun(self._pages.read())
        return self._pages.found.popleft()
