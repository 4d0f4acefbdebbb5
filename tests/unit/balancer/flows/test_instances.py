"""Reads of pools with several shards, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.balancer import EventKind, PoolEvent
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.flows import instances
from agentperf_redis.balancer.layouts import Layouts

CURSORS = [["1-0", "2-0", "3-0"], ["2-0", "2-1", "3-0", "4-0"], ["3-0", "4-1"]]


class NoBackend:
    namespace = "n"
    node_of = str


def page(after: str | None, limit: int) -> list[str]:
    backend: Any = NoBackend()
    layouts = Layouts(backend)
    layouts.learn("coder", len(CURSORS))
    flow = instances.events(layouts, Pool.of("n", "coder"), after, limit)
    next(flow)
    earlier = _key(after or "0-0")
    later = [[each for each in cursors if _key(each) > earlier][:limit] for cursors in CURSORS]
    try:
        flow.send([[_event(cursor) for cursor in cursors] for cursors in later])
        flow.send(len(CURSORS))
    except StopIteration as end:
        return [event.cursor for event in end.value]
    raise AssertionError("the flow must end")


def _key(cursor: str) -> tuple[int, ...]:
    return tuple(map(int, cursor.split("-")))


def _event(cursor: str) -> PoolEvent:
    return PoolEvent("coder", EventKind.REGISTERED, "p0", 0.0, cursor, {})


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100])
def test_pages_of_events_miss_none(limit: int) -> None:
    found: list[str] = []
    cursor = "0-0"
    while some := page(cursor, limit):
        assert len(some) <= max(limit, len(CURSORS))
        found += some
        cursor = some[-1]
    assert found == sorted((each for cursors in CURSORS for each in cursors), key=_key)
