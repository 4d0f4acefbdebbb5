"""Classes are stored once they are registered, each under a name of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest

from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import InvalidArgument, Undecodable


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.5


class Pair(NamedTuple):
    left: int
    right: str


class Money:
    cents: int


def test_a_class_unknown_to_this_process_is_undecodable() -> None:
    known = Registry()
    known.add(Point)
    with pytest.raises(Undecodable, match="no class is registered"):
        Codec(registry=Registry()).decode(Codec(registry=known).encode(Point(1)))


def test_a_registry_tells_what_it_does_not_take() -> None:
    own = Registry()
    with pytest.raises(InvalidArgument, match="dataclass"):
        own.add(object)
    with pytest.raises(InvalidArgument, match="a class"):
        own.add("Point")  # type: ignore[type-var]  # wrong on purpose
    with pytest.raises(InvalidArgument, match="dump and load together"):
        own.add(Money, dump=lambda money: money.cents)
    own.add(Point, name="point")
    with pytest.raises(InvalidArgument, match="other than that of Point"):
        own.add(Pair, name="point")
    assert own.add(Point, name="point") is Point
    assert b"point" in Codec(registry=own).encode(Point(1))


def test_the_public_decorator_is_the_process_registrys() -> None:
    import agentperf_redis

    @agentperf_redis.storable
    @dataclass(frozen=True)
    class Finding:
        line: int
        text: str

    codec = Codec()
    assert codec.decode(codec.encode([Finding(1, "x")])) == [Finding(1, "x")]
