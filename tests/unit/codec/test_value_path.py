"""A refused value is named by where it stands in what was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import InvalidArgument


@dataclass
class Report:
    words: dict[str, Any]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda odd: odd, "value"),
        (lambda odd: {"a": [1, 2, 3, odd]}, "value['a'][3]"),
        (lambda odd: [(1, {"b": odd})], "value[0][1]['b']"),
        (lambda odd: {odd: 1}, "a key of value"),
        (lambda odd: [{odd}], "an item of value[0]"),
        (lambda odd: [Report({"w": (odd,)})], "value[0].words['w'][0]"),
        (lambda odd: {"k" * 100: odd}, "value['" + "k" * 56 + "...]"),
    ],
)
def test_a_refusal_says_where_in_the_value_it_lies(make: Callable[[object], object], path: str) -> None:
    registry, odd = Registry(), object()
    registry.add(Report)
    with pytest.raises(InvalidArgument) as refused:
        Codec(registry=registry).encode(make(odd))
    assert (refused.value.argument, refused.value.value) == ("value", odd)
    assert str(refused.value).endswith("not builtins.object" + (f"; it stands at {path}" if path != "value" else ""))


def test_a_refusal_within_what_contains_itself_has_no_path() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArgument) as refused:
        Codec().encode(value)
    assert "stands at" not in str(refused.value)
