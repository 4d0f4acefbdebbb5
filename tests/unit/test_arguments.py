from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any

import pytest

from agentperf_redis import AgentInstance, arguments
from agentperf_redis.errors import InvalidArgument


class Colour(Enum):
    RED = "red"


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", ["a", "a b", "{", "}", "{}", "a}b{c", "*?[", "héllo", "名", "x" * 200, "%", "a:b", "🤖"]
)
def test_valid_names_are_accepted_unchanged(value: str) -> None:
    assert arguments.name("agent", value) == value


@pytest.mark.parametrize(
    "value", ["", "\0", "a\r\n", "\ud800", "x" * 201, "x" * 10**6, "\x7f", "\x85", None, 1, b"a", ["a"], True]
)
def test_invalid_names_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        arguments.name("agent", value)
    assert caught.value.argument == "agent"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, math.inf, 0, -1, 1e-9, 1e300, 10**400, True, False, "5", None, [], 1j, Decimal(1)]
)
def test_invalid_durations_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"ttl is .*; allowed: seconds from"):
        arguments.seconds("ttl", value)


def test_bounds_are_shown_without_exponents() -> None:
    with pytest.raises(InvalidArgument, match=r"allowed: seconds from 0\.001 to 316224000, or math\.inf$"):
        arguments.seconds("ttl", 0, endless=True)
    with pytest.raises(InvalidArgument, match=r"allowed: a number from 0 to 1000000000000000$"):
        arguments.amount("cost", -1)


def test_timedelta_error_suggests_total_seconds() -> None:
    with pytest.raises(
        InvalidArgument, match=r"seconds from 0\.001 to 316224000; for a timedelta, pass \.total_seconds\(\)$"
    ):
        arguments.seconds("ttl", timedelta(minutes=5))


def test_non_string_key_error_states_allowed_values() -> None:
    with pytest.raises(InvalidArgument, match=r"key is 1; allowed: a string$"):
        arguments.cache_key("key", 1)
    with pytest.raises(InvalidArgument, match=r"allowed: a string without lone surrogates$"):
        arguments.cache_key("key", "\ud800")


def test_valid_durations_become_floats() -> None:
    assert arguments.seconds("ttl", 1) == 1.0
    assert arguments.seconds("ttl", Fraction(1, 2)) == 0.5
    assert arguments.seconds("ttl", math.inf, endless=True) == math.inf


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**53 + 1, 2**63, 2**64, True, 1.0, 1.5, "1", None, math.nan])
def test_invalid_counts_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="max_capacity is"):
        arguments.count("max_capacity", value)


@pytest.mark.parametrize("value", [-1, -0.001, 1.1, math.nan, math.inf, 1e300, 2**4000, True, "1", None])
def test_invalid_amounts_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"weight is .*; allowed: a number from 0 to 1$"):
        arguments.amount("weight", value, maximum=1.0)


@pytest.mark.parametrize("value", [5, None, b"k", [], "\ud800"])
def test_invalid_cache_keys_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="key is"):
        arguments.cache_key("key", value)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_non_bool_flags_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="strict is"):
        arguments.flag("strict", value)


@pytest.mark.parametrize("value", ["one", b"one", 1, None, ["a", ""]])
def test_invalid_collections_of_names_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument):
        arguments.names("tags", value)


def test_choices_accept_member_or_value() -> None:
    assert arguments.choice("colour", "red", Colour) is arguments.choice("colour", Colour.RED, Colour) is Colour.RED
    with pytest.raises(InvalidArgument, match="one of 'red'"):
        arguments.choice("colour", "blue", Colour)


@pytest.mark.parametrize(
    "check", [arguments.name, arguments.seconds, arguments.count, arguments.amount, arguments.flag, arguments.cache_key]
)
def test_value_with_failing_repr_is_still_refused(check: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgument, match="<Rude object>"):
        check("x", Rude())


def test_invalid_argument_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="flag is 1; allowed: True or False"):
        arguments.flag("flag", 1)


def test_negative_zero_becomes_positive_zero() -> None:
    for value in (
        arguments.amount("weight", -0.0),
        arguments.seconds("wait", -0.0, minimum=0.0),
        AgentInstance("a", "b", weight=-0.0).weight,
    ):
        assert math.copysign(1.0, value) == 1.0


class Agent(str, Enum):  # noqa: UP042  unlike with a StrEnum, `format()` does not return the value
    CODER = "coder"


class Unhashable(str):
    """A text that cannot be compared or hashed."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")


@pytest.mark.parametrize("check", [arguments.name, arguments.cache_key])
@pytest.mark.parametrize("value", [Agent.CODER, Unhashable("coder")])
def test_text_of_another_class_becomes_an_exact_str(check: Callable[..., str], value: str) -> None:
    checked = check("agent", value)
    assert type(checked) is str
    assert f"{checked}" == "coder"


def test_choice_refuses_text_that_cannot_be_compared() -> None:
    with pytest.raises(InvalidArgument, match="one of 'red'"):
        arguments.choice("colour", Unhashable("blue"), Colour)
    assert arguments.choice("colour", Unhashable("red"), Colour) is Colour.RED


async def coroutine_function() -> None: ...


class AsyncCallable:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize("value", [None, 3, coroutine_function, AsyncCallable(), functools.partial(coroutine_function)])
def test_callbacks_are_plain_functions(value: object) -> None:
    assert arguments.callback("progress", len, "a function") is len
    with pytest.raises(InvalidArgument, match=r"progress is .* allowed: a function; not a coroutine function"):
        arguments.callback("progress", value, "a function")


def test_awaitable_results_of_callbacks_are_refused_and_closed() -> None:
    arguments.refuse_awaitable("progress", len, 3)
    result = coroutine_function()
    with pytest.raises(InvalidArgument, match="need not be awaited"):
        arguments.refuse_awaitable("progress", len, result)
    assert inspect.getcoroutinestate(result) == inspect.CORO_CLOSED
