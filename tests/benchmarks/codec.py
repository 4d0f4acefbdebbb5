"""Benchmarks of encoding and decoding, against plain msgpack, which loses types and accepts hostile bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgpack

from agentperf_redis.codec.codec import Codec, canonical
from tests.benchmarks.measure import Bench, Row, micros

SMALL = {"id": 17, "name": "planner", "ok": True, "score": 0.5, "tags": ["a", "b"]}
TYPED = {"at": datetime(2026, 1, 2, tzinfo=UTC), "price": Decimal("1.10"), "range": (1, 2), "seen": {"a", "b"}}
ARGUMENTS = (("why is the sky blue?", 3), {"model": "large"})


def rows(bench: Bench) -> Iterator[Row]:
    """Measure the time to encode and decode two values, and to make a cache key.

    One value is small, the other has unusual types.
    """
    codec, bare = Codec(), msgpack.packb(SMALL)
    small, typed = codec.encode(SMALL), codec.encode(TYPED)

    def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
        def run(times: int) -> None:
            for _ in range(times):
                call()

        return run

    pack, unpack = repeated(lambda: msgpack.packb(SMALL)), repeated(lambda: msgpack.unpackb(bare))
    for work, ours, theirs in (
        ("encode a small dict", repeated(lambda: codec.encode(SMALL)), pack),
        ("decode a small dict", repeated(lambda: codec.decode(small)), unpack),
        ("encode datetime, Decimal, tuple and set", repeated(lambda: codec.encode(TYPED)), pack),
        ("decode datetime, Decimal, tuple and set", repeated(lambda: codec.decode(typed)), unpack),
        ("make a cache key of arguments", repeated(lambda: canonical(ARGUMENTS)), pack),
    ):
        pair = bench.pair(ours, theirs, 5000)
        yield Row(work, micros(pair.ours_s), f"msgpack, small dict {micros(pair.reference_s)}", pair.ratio, "", None)
