"""The check of damaged state finds writes of operations that fail, and undoes each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis.errors import CorruptState
from tests.support.damage import Namespace, faults
from tests.support.servers import Server

WRITES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda raw: raw.get("text"),
    "the same value": lambda raw: raw.hset("hash", "field", raw.hget("hash", "field")),
    "a field": lambda raw: raw.hset("hash", "other", "1"),
    "a score": lambda raw: raw.zincrby("zset", 1, "member"),
    "an element": lambda raw: raw.rpush("list", "x"),
    "an entry": lambda raw: raw.xadd("stream", {"x": "y"}),
    "an expiry": lambda raw: raw.pexpire("text", 1_000_000),
    "a new key": lambda raw: raw.set("new", "x"),
    "no key any longer": lambda raw: raw.delete("list"),
}
SILENT = ("nothing", "the same value")


@pytest.fixture
def raw(own_server: Server) -> Iterator[Any]:
    with own_server.client() as client:
        client.set("text", "5", px=2_000_000)
        client.hset("hash", mapping={"field": "5"})
        client.zadd("zset", {"member": 5.0})
        client.rpush("list", "5")
        client.xadd("stream", {"kind": "5"})
        yield client


@pytest.mark.parametrize("what", WRITES)
def test_write_of_a_failed_operation_is_found_and_undone(own_server: Server, raw: Any, what: str) -> None:
    def fail() -> None:
        WRITES[what](raw)
        raise CorruptState("hash", "damaged")

    with own_server.client(decode_responses=False) as binary:
        stored = Namespace(raw, binary)
        before = stored.state()
        damages = list(stored.damages(lambda key: key == "hash"))
        found = faults(stored, lambda operation: operation(), iter(damages[-3:]), {"op": lambda: fail})

        assert stored.state() == before
    assert len(found) == (0 if what in SILENT else 3)
    assert all("after writing" in line for line in found)
