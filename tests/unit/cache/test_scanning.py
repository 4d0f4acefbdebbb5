"""A scan reads a page when the keys of the previous page are used up. This process matches them with the pattern."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.flows import inspection
from agentperf_redis.command import Flow

PAGES: dict[inspection.Cursor, tuple[inspection.Cursor | None, list[str]]] = {
    inspection.FIRST_PAGE: ((0, 0, "7"), ["a", "b*"]),
    (0, 0, "7"): ((0, 1, "0"), []),
    (0, 1, "0"): (None, ["c", "ab", "a"]),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[inspection.Cursor]:
    """The cursors of the pages that were read."""
    cursors: list[inspection.Cursor] = []

    def page(shared: Any, cursor: inspection.Cursor, count: int) -> Flow[tuple[inspection.Cursor | None, list[str]]]:
        yield from ()
        cursors.append(cursor)
        return PAGES[cursor]

    monkeypatch.setattr(inspection, "page", page)
    return cursors


def test_pages_are_read_on_demand(dead_backend: Backend, read: list[inspection.Cursor]) -> None:
    keys = LRUCache(name="c", backend=dead_backend).scan()
    assert read == []
    assert [next(keys), next(keys)] == ["a", "b*"]
    assert read == [inspection.FIRST_PAGE]
    assert list(keys) == ["c", "ab", "a"]
    assert read == [inspection.FIRST_PAGE, (0, 0, "7"), (0, 1, "0")]
    assert list(keys) == []


@pytest.mark.parametrize(("match", "found"), [("a*", ["a", "ab", "a"]), ("?[*]", ["b*"]), ("A", []), ("", [])])
def test_match_is_a_pattern_for_the_whole_key(
    dead_backend: Backend, read: list[inspection.Cursor], match: str, found: list[str]
) -> None:
    cache = LRUCache(name="c", backend=dead_backend)

    async def scan() -> list[str]:
        return [key async for key in cache.aio.scan(match=match)]

    assert list(cache.scan(match=match)) == asyncio.run(scan()) == found
