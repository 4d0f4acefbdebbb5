from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from agentperf_redis.metrics.llm_fields import Fields, is_scalar

KNOWN = ("usage", "model", "total", "cached")


class Message:
    """Imitates a protobuf message: the descriptor names the fields, and C code stores their values."""

    DESCRIPTOR = SimpleNamespace(fields_by_name={"usage": None, "other": None})

    def __getattr__(self, name: str) -> Any:
        if name == "usage":
            return 5
        raise AttributeError(name)


class Base:
    usage = 1
    model = "m"

    def total(self) -> int:
        raise AssertionError("never called")

    @classmethod
    def cached(cls) -> int:
        raise AssertionError("never called")


class Derived(Base):
    def usage(self) -> int:  # type: ignore[override]  # hides the field
        raise AssertionError("never called")


class Both(dict[str, Any]):
    """Imitates the types of `huggingface_hub`: a mapping with attributes."""


def both() -> Both:
    made = Both(usage=1)
    made.model = "m"  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"usage": 1, "other": 2, 3: 4}, {"usage": 1}),
        (SimpleNamespace(usage=1, other=2), {"usage": 1}),
        (Base(), {"usage": 1, "model": "m"}),
        (Derived(), {"model": "m"}),
        (Message(), {"usage": 5}),
        (both(), {"usage": 1, "model": "m"}),
        ("usage", {}),
        (7, {}),
        (["usage"], {}),
    ],
)
def test_fields_are_found_where_they_are_stored(source: object, expected: dict[str, Any]) -> None:
    fields = Fields(KNOWN)
    assert {name: fields.get(source, name) for name in fields.names(source)} == expected
    for absent in set(KNOWN) - set(expected):
        assert fields.get(source, absent) is None


def test_missing_field_of_a_mock_is_never_created() -> None:
    mock = MagicMock(usage=MagicMock(total=3))
    fields = Fields(KNOWN)
    assert fields.names(mock) == {"usage"}
    assert fields.get(fields.get(mock, "usage"), "total") == 3
    assert fields.get(mock, "model") is None
    assert set(vars(mock)["_mock_children"]) == {"usage"}


def test_dynamic_field_is_readable_after_its_lookup() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            return getattr(SimpleNamespace(usage=1), name)

    proxy, fields = Proxy(), Fields(KNOWN)
    assert fields.names(proxy) == set()
    assert fields.get(proxy, "usage") is None
    assert fields.dynamic_names(proxy) == {"usage"}
    assert fields.get(proxy, "usage") == 1


@pytest.mark.parametrize("value", [None, True, 1, 0.5, "x", b"x", int, pytest])
def test_scalars_are_not_searched(value: object) -> None:
    assert is_scalar(value)
    assert not is_scalar([value])
