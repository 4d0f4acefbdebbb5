"""The state of a cache in a process follows the layout of the server."""

from __future__ import annotations

from dataclasses import replace

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache


def test_reads_of_local_copies_are_reported_to_the_new_shards(dead_backend: Backend) -> None:
    shared = LRUCache(4000, name="c", backend=dead_backend, shards=2, local_size=10)._shared_state
    shared.lay_out(shared.settings)
    shared._undelivered[shared.shards[0]] = [("k", 1, 0)]
    for shards in (4, 1):
        shared.lay_out(replace(shared.settings.own, shards=shards, layout=shared.layout + 1))
        assert list(shared._undelivered) == [shared.shard("k")]
    assert shared.shards[0].access_buffer.drain() == [("k", 1, 0)]
    assert shared._undelivered == {}
