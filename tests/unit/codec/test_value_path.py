"""If an item in a value cannot be stored, the error names the path of the item."""

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
        (lambda unstorable: unstorable, "value"),
        (lambda unstorable: {"a": [1, 2, 3, unstorable]}, "value['a'][3]"),
        (lambda unstorable: [(1, {"b": unstorable})], "value[0][1]['b']"),
        (lambda unstorable: {unstorable: 1}, "a key of value"),
        (lambda unstorable: [{unstorable}], "an item of value[0]"),
        (lambda unstorable: [Report({"w": (unstorable,)})], "value[0].words['w'][0]"),
        (lambda unstorable: {"k" * 100: unstorable}, "value['" + "k" * 56 + "...]"),
    ],
)
def test_refusal_names_the_path_of_the_item(make: Callable[[object], object], path: str) -> None:
    registry, unstorable = Registry(), object()
    registry.add(Report)
    with pytest.raises(InvalidArgument) as refused:
        Codec(registry=registry).encode(make(unstorable))
    assert (refused.value.argument, refused.value.value) == ("value", unstorable)
    assert str(refused.value).endswith("not builtins.object" + (f"; it is at {path}" if path != "value" else ""))


def test_refusal_of_recursive_value_has_no_path() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArgument) as refused:
        Codec().encode(value)
    assert "it is at" not in str(refused.value)
