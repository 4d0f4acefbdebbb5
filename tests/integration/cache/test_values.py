"""Values come back equal and of the same type on every path, and planted bytes run no code."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

import numpy as np
import pydantic
import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import CorruptState
from tests.support.caches import copied
from tests.support.calls import Call
from tests.support.servers import Raw

REGISTRY = Registry()


@REGISTRY.add
class Colour(Enum):
    RED = "red"


@REGISTRY.add
@dataclass
class Finding:
    line: int
    words: list[str]


@REGISTRY.add
class Place(NamedTuple):
    line: int
    words: tuple[str, ...] = ()


@REGISTRY.add
class Report(pydantic.BaseModel):
    title: str
    places: list[Place]
    seen: set[int] = set()


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    -(2**70),
    1.5,
    -0.0,
    math.inf,
    complex(1, -2),
    "",
    "text",
    "\x00é\U0001f600",
    b"\x00\xff",
    bytearray(b"x"),
    [],
    [1, [2, (3,)]],
    (),
    (1, [2]),
    {},
    {"a": {1: (2,)}, (1, 2): {3}},
    {1, "a"},
    frozenset({1}),
    datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    datetime(2026, 1, 2),  # noqa: DTZ001  naive values stay naive
    date(2026, 1, 2),
    time(1, 2, 3),
    timedelta(days=-1, microseconds=1),
    Decimal("1.10"),
    UUID(int=5),
    Colour.RED,
    Finding(3, ["long"]),
    Place(3, ("long",)),
    Report(title="Lines", places=[Place(3), Place(5, ("a", "b"))], seen={1}),
    "x" * 20_000,
    np.arange(6, dtype="int32").reshape(2, 3),
    np.float64(0.1),
]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and bool(np.array_equal(one, other))
    return type(one) is type(other) and repr(one) == repr(other) and bool(one == other)


@pytest.mark.parametrize("value", VALUES, ids=[f"{at} {type(value).__name__}" for at, value in enumerate(VALUES)])
def test_value_is_equal_on_miss_hit_and_copy(call: Call, backend: Backend, value: Any) -> None:
    cache = LRUCache(backend=backend, local_size=10, codec=Codec(registry=REGISTRY))
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return value

    assert same(call(cache, "get_or_compute", "k", compute), value)
    assert same(call(cache, "get", "k", fresh=True), value)
    copied(cache, "k")
    assert same(call(cache, "get", "k", "nothing"), value)
    assert same(call(cache, "get_or_compute", "k", compute), value)
    assert calls == [1]


def spoil(value: Any) -> None:
    value["list"][0].append("spoilt")
    value["dict"]["inner"]["spoilt"] = True
    value["set"].clear()
    value["bytes"] += b"spoilt"
    value["finding"].words.clear()
    value["array"][:] = 9
    value.clear()


def test_changing_a_result_does_not_affect_other_callers(call: Call, backend: Backend) -> None:
    """Callers compute the value, wait for it, or read it from Redis or a local copy."""

    def value() -> dict[str, Any]:
        finding, array = Finding(1, ["a"]), np.zeros(3)
        return {"list": [[1]], "dict": {"inner": {}}, "set": {1}, "bytes": bytearray(b"x"), "finding": finding} | {
            "array": array
        }

    cache = LRUCache(backend=backend, local_size=10, codec=Codec(registry=REGISTRY))
    go_on = threading.Event()

    def compute() -> Any:
        assert go_on.wait(10)
        return value()

    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(cache.get_or_compute, "k", compute) for _ in range(4)]
        go_on.set()
        for computed in waiting:
            got = computed.result(10)
            assert repr(got) == repr(value())
            spoil(got)
    copied(cache, "k")
    for method, args, options in (
        ("get", ("k",), {"fresh": True}),
        ("get", ("k",), {}),
        ("get_or_compute", ("k", compute), {}),
    ):
        for _ in range(2):
            got = call(cache, method, *args, **options)
            assert repr(got) == repr(value()), method
            spoil(got)
    for _ in range(2):
        got = call(cache, "get_many", ["k"])["k"]
        assert repr(got) == repr(value())
        spoil(got)
    given = value()
    call(cache, "put", "k2", given)
    spoil(given)
    assert repr(call(cache, "get", "k2")) == repr(value())


class Planted:
    """An object that records its unpickling."""

    seen: ClassVar[list[int]] = []

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.seen.append, (1,)


CACHES: dict[str, Callable[[Backend, str], LRUCache | TieredCache]] = {
    "lru": lambda backend, name: LRUCache(name=name, backend=backend),
    "strict": lambda backend, name: LRUCache(name=name, strict=True, backend=backend),
    "tiered": lambda backend, name: TieredCache(name=name, backend=backend),
}
INDEXES = {
    "lru": {"meta", "size", "cold"},
    "strict": {"meta", "size", "cold"},
    "tiered": {"meta", "size", "new", "hot", "warm", "cold", "ghost"},
}
"""For each kind of cache, the index keys that its scripts always read first. These keys must have the right type. A
cache of this kind uses no other index keys."""
PARTS = (
    "meta",
    "size",
    "new",
    "hot",
    "warm",
    "cold",
    "ghost",
    "epochs",
    "tags",
    "e:k",
    "l:k",
    "resent",
    "deferred",
    "deferred:",
)


def refused(kind: str, part: str) -> set[str]:
    """Return the methods that report the corrupt key. All other methods work as usual or return a miss."""
    if part in INDEXES[kind]:
        reads = {"get"} if kind == "strict" else set()
        return {"put", "delete", "sweep", "clear"} | ({"invalidate_tags"} if part == "meta" else set()) | reads
    return {
        "epochs": {"invalidate_tags"},
        "tags": {"get", "get_many", "invalidate_tags", "clear"},
        "deferred": {"sweep", "clear"},
        "deferred:": set(),
        "resent": set(),
        "e:k": set(),
        "l:k": set(),
    }.get(part, {"clear"})


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("kind", CACHES)
def test_planted_bytes_run_nothing_and_are_reported(
    call: Call, backend: Backend, raw: Raw, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With hostile bytes in any key, reads are misses or report the key, and `get_or_compute` still computes."""
    import pickle

    hostile = [pickle.dumps(Planted()), b"", b"\xff" * 50, b"0 0 0 0 0 0", b"1 0 r 0  z\x00"]
    cases = [(part, payload) for part in PARTS for payload in (hostile if part in ("e:k", "epochs") else hostile[:1])]
    for case, (part, payload) in enumerate(cases):
        cache = CACHES[kind](backend, f"c{case}")
        where = cache._shared_state.keys.tag + ":" + part
        if part == "deferred:":  # this key contains cleared values that wait for a sweep
            call(cache, "put_many", {f"k{number}": 1 for number in range(100)})
            call(cache, "clear")
        call(cache, "put", "k", 1, tags=["t"])
        call(cache, "invalidate_tags", "u")
        if part == "deferred:":
            (where,) = raw.scan_iter(match=f"{where}*")
        if part == "l:k":
            call(cache, "delete", "k")
        raw.delete(where)
        raw.set(where, payload)
        caplog.clear()
        refusing = refused(kind, part)
        value = None if part in ("e:k", "epochs", "l:k") else 1

        for method, args, expected in (
            ("get", ("k",), value),
            ("get_many", (["k"],), {} if value is None else {"k": value}),
            ("put", ("k2", 2), True),
            ("delete", ("k2",), True),
            ("invalidate_tags", ("w",), None),
            ("get_or_compute", ("k3", lambda: "computed"), "computed"),
            ("get_or_compute", ("k", lambda: "computed"), value if value and "get" not in refusing else "computed"),
            ("sweep", (), 0),
            ("clear", (), None),
        ):
            if method in refusing:
                with pytest.raises(CorruptState) as corrupt:
                    call(cache, method, *args)
                assert corrupt.value.key == where, method
            else:
                assert call(cache, method, *args) == expected, (part, payload, method)

        reported = [record for record in caplog.records if "counts as missing" in record.getMessage()]
        assert bool(reported) == (part in ("e:k", "epochs", "l:k")), part
        if reported:
            assert call(cache, "stats").corrupt > 0, part
        elif part not in INDEXES[kind]:
            assert refusing or part in ("resent", "deferred:"), "no result depends on them"
    assert Planted.seen == []
    used = {key.rpartition("}:")[2] for key in raw.scan_iter(match=f"{backend.namespace}:*}}:*")}
    assert {re.sub("^(e|l):.*", r"\1:k", re.sub("^deferred:.*", "deferred:", part)) for part in used} <= set(PARTS)
