"""Common checks of users' arguments. They run before any request is sent.

A check takes the name of the argument and its value. It returns the normalized value, or raises
`InvalidArgument` with the argument, the value and the allowed values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from agentperf_redis.errors import InvalidArgument

MAX_NAME_CHARACTERS = 200
MAX_COUNT = 2**31 - 1
"""Maximum of sizes and capacities. A larger value is probably a typo. Lua numbers are doubles and hold it exactly."""
MAX_SECONDS = 10 * 366 * 86_400.0
"""Ten years of 366 days. Some arguments also allow `math.inf`."""

_PLAIN = (float, int)
_NAME_ALLOWED = f"a string of 1 to {MAX_NAME_CHARACTERS} characters without control characters or lone surrogates"
_FIRST_PRINTABLE, _DELETE, _FIRST_HIGH_PRINTABLE = 0x20, 0x7F, 0xA0

E = TypeVar("E", bound=Enum)


def encodable(text: str) -> bool:
    """Whether the text has no lone surrogate, so that it can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name(argument: str, value: object) -> str:
    """Check a user-supplied name of an agent, a cache, an instance or a tag."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARACTERS:
        raise InvalidArgument(argument, value, _NAME_ALLOWED)
    # A printable string has neither a control character nor a lone surrogate. Some unprintable characters are allowed,
    # such as a line separator.
    if not value.isprintable() and (not encodable(value) or any(map(_is_control, value))):
        raise InvalidArgument(argument, value, _NAME_ALLOWED)
    return plain_text(value)


def plain_text(text: str) -> str:
    """Return a text as an exact str, because a subclass may define `__hash__`, `__eq__` or `__format__` of its own."""
    return text if type(text) is str else str.__str__(text)


def nearest_name(text: str) -> str:
    """Return the valid name that is nearest to a text, such as the name of a class."""
    if not text.isprintable() or not encodable(text):
        plain = "".join("?" if _is_control(character) else character for character in text)
        text = plain.encode(errors="replace").decode()
    return text[:MAX_NAME_CHARACTERS] or "?"


def _is_control(character: str) -> bool:
    code = ord(character)
    return code < _FIRST_PRINTABLE or _DELETE <= code < _FIRST_HIGH_PRINTABLE


def names(argument: str, value: object) -> tuple[str, ...]:
    """Check several names. A bare string is refused, since iterating over it would yield single characters."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidArgument(argument, value, "a collection of names, such as a tuple or a set of strings")
    return tuple(name(argument, item) for item in value)


def cache_key(argument: str, value: object) -> str:
    """Check the key of a cache entry: any string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise InvalidArgument(argument, value, "a string")
    if not encodable(value):
        raise InvalidArgument(argument, value, "a string without lone surrogates")
    return plain_text(value)


def _is_number(value: object, kind: str) -> bool:
    """Whether a value that is neither a float nor an int is a number of this kind, such as a number of NumPy."""
    import numbers  # imported here, because the import takes 0.6 ms and most programs pass only floats and ints

    return not isinstance(value, bool) and isinstance(value, getattr(numbers, kind))


def number(argument: str, value: object, allowed: str) -> float:
    """Check that a value is a real number, finite or infinite. Refuses bool and NaN; -0.0 becomes 0.0."""
    if type(value) not in _PLAIN and not _is_number(value, "Real"):
        raise InvalidArgument(argument, value, allowed)
    try:
        result = float(value)  # type: ignore[arg-type]  # an int, a float or another Real
    except OverflowError:
        raise InvalidArgument(argument, value, allowed) from None
    if math.isnan(result):
        raise InvalidArgument(argument, value, allowed)
    return result + 0.0  # -0.0 + 0.0 is 0.0 (IEEE 754)


def seconds(
    argument: str,
    value: object,
    *,
    minimum: float = 0.001,
    maximum: float = MAX_SECONDS,
    endless: bool = False,
) -> float:
    """Check a duration in seconds. `endless` also allows `math.inf`."""
    allowed = f"seconds from {_as_text(minimum)} to {_as_text(maximum)}" + (", or math.inf" if endless else "")
    if isinstance(value, timedelta):
        allowed += "; for a timedelta, pass .total_seconds()"
    result = number(argument, value, allowed)
    if endless and result == math.inf:
        return result
    if not minimum <= result <= maximum:
        raise InvalidArgument(argument, value, allowed)
    return result


def amount(argument: str, value: object, *, minimum: float = 0.0, maximum: float = 1e15) -> float:
    """Check a real number within bounds, such as a weight or a cost."""
    allowed = f"a number from {_as_text(minimum)} to {_as_text(maximum)}"
    result = number(argument, value, allowed)
    if not minimum <= result <= maximum:
        raise InvalidArgument(argument, value, allowed)
    return result


def count(argument: str, value: object, *, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
    """Check a whole number within bounds, such as a size or a capacity."""
    whole = type(value) is int or _is_number(value, "Integral")
    if not whole or not minimum <= int(value) <= maximum:  # type: ignore[call-overload]  # an int or another Integral
        raise InvalidArgument(argument, value, f"a whole number from {minimum} to {maximum}")
    return int(value)  # type: ignore[call-overload,no-any-return]


def choice(argument: str, value: object, options: type[E]) -> E:
    """Check that an argument is a member of an Enum, or the value of a member. Return the member."""
    if isinstance(value, options):
        return value
    if isinstance(value, str):
        text = plain_text(value)
        for option in options:
            if option.value == text:
                return option
    raise InvalidArgument(argument, value, "one of " + ", ".join(repr(option.value) for option in options))


def flag(argument: str, value: object) -> bool:
    """Check that a value is a bool; other truthy or falsy values are refused."""
    if not isinstance(value, bool):
        raise InvalidArgument(argument, value, "True or False")
    return value


def _as_text(bound: float) -> str:
    return f"{bound:.16g}"  # in this format, 0 and the numbers in [0.0001, 10^16) have no exponent


def callback(argument: str, value: object, allowed: str) -> Callable[..., object]:
    """Check a function whose result the library neither awaits nor iterates over. None is refused.

    A call of a coroutine function or generator function runs none of its code, so its work would be silently lost.
    """
    if not callable(value) or is_coroutine_function(value):
        raise InvalidArgument(argument, value, f"{allowed}; not a coroutine function, which nothing would await")
    if is_generator_function(value):
        raise InvalidArgument(argument, value, f"{allowed}; not a generator function, which nothing would iterate")
    return value


def is_coroutine_function(function: object) -> bool:
    """Whether a function, or an object with `__call__`, is known to return a coroutine when it is called."""
    return any(map(inspect.iscoroutinefunction, _called_by(function)))


def is_generator_function(function: object) -> bool:
    """Whether a function, or an object with `__call__`, is known to return a generator when it is called."""
    return any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in _called_by(function))


def _called_by(function: object) -> tuple[Any, ...]:
    """Return the functions that a call of this object may run."""
    return (function, getattr(type(function), "__call__", None))  # noqa: B004


def refuse_awaitable(
    argument: str, function: object, result: object, allowed: str = "a function whose result need not be awaited"
) -> None:
    """Raise an error if a user's function has returned an awaitable, because the caller cannot await the result.

    Only the result shows whether a plain function returns an awaitable, so this check is made after the call. A refused
    coroutine is closed, so that Python does not warn that it was never awaited.

    Raises:
        InvalidArgument: the result is an awaitable.
    """
    if inspect.isawaitable(result):
        close_coroutine(result)
        raise InvalidArgument(argument, function, allowed)


def refuse_unfinished(argument: str, function: object, result: object) -> None:
    """Refuse an awaitable, as `refuse_awaitable` does. Also refuse a generator: its body has not run.

    Raises:
        InvalidArgument: the result is an awaitable or a generator.
    """
    refuse_awaitable(argument, function, result)
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise InvalidArgument(argument, function, "a function that does its work when it is called, not a generator")


def close_coroutine(result: object) -> None:
    """Close a coroutine that is not awaited. Does nothing with other objects."""
    if inspect.iscoroutine(result):
        result.close()
