"""The one place where what users pass is checked, before anything is sent.

Each function takes the name of the argument and its value, and returns the value in its clean form or raises
`InvalidArgument` naming the argument, the value and what is allowed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

from agentperf_redis.errors import InvalidArgument

MAX_NAME_CHARACTERS = 200
MAX_COUNT = 2**31 - 1
"""Sizes and capacities: more is a typing error, and products of two stay exact in a double."""
MAX_SECONDS = 10 * 366 * 86_400.0
"""Ten years; what is to last longer has `math.inf`."""

_PLAIN = (float, int)
_NAME_ALLOWED = f"a string of 1 to {MAX_NAME_CHARACTERS} characters without control characters or lone surrogates"
_FIRST_PRINTABLE, _DELETE, _FIRST_HIGH_PRINTABLE = 0x20, 0x7F, 0xA0

E = TypeVar("E", bound=Enum)


def encodable(text: str) -> bool:
    """Whether text can be sent as UTF-8, that is, holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name(argument: str, value: object) -> str:
    """Check a name given by a user: of an agent, a cache, an instance, a tag."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARACTERS:
        raise InvalidArgument(argument, value, _NAME_ALLOWED)
    # What is printable holds neither; of the rest, a line separator, say, may be in a name.
    if not value.isprintable() and (not encodable(value) or any(map(_is_control, value))):
        raise InvalidArgument(argument, value, _NAME_ALLOWED)
    return value


def nearest_name(text: str) -> str:
    """Return the text as `name` would take it, for names that nobody chose to be one, such as those of classes."""
    if not text.isprintable() or not encodable(text):
        plain = "".join("?" if _is_control(character) else character for character in text)
        text = plain.encode(errors="replace").decode()
    return text[:MAX_NAME_CHARACTERS] or "?"


def _is_control(character: str) -> bool:
    code = ord(character)
    return code < _FIRST_PRINTABLE or _DELETE <= code < _FIRST_HIGH_PRINTABLE


def names(argument: str, value: object) -> tuple[str, ...]:
    """Check several names; one bare string is refused, since it would be taken apart into letters."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidArgument(argument, value, "a collection of names, such as a tuple or a set of strings")
    return tuple(name(argument, item) for item in value)


def cache_key(argument: str, value: object) -> str:
    """Check the key of a cache entry: any string that can be encoded."""
    if not isinstance(value, str):
        raise InvalidArgument(argument, value, "a string")
    if not encodable(value):
        raise InvalidArgument(argument, value, "a string without lone surrogates")
    return value


def number(argument: str, value: object, allowed: str) -> float:
    """Check for a real, finite or infinite number that is no bool; NaN is refused, and -0.0 becomes 0.0."""
    plain = type(value) in _PLAIN  # spares most callers the slow question to an abstract class
    if not plain and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise InvalidArgument(argument, value, allowed)
    try:
        result = float(value)  # type: ignore[arg-type]  # one of these two, or a Real
    except OverflowError:
        raise InvalidArgument(argument, value, allowed) from None
    if math.isnan(result):
        raise InvalidArgument(argument, value, allowed)
    return result + 0.0  # the sum of both zeros is the positive one (IEEE 754)


def seconds(
    argument: str,
    value: object,
    *,
    minimum: float = 0.001,
    maximum: float = MAX_SECONDS,
    endless: bool = False,
) -> float:
    """Check a length of time in seconds. `endless` allows `math.inf` as well."""
    allowed = f"seconds from {_plainly(minimum)} to {_plainly(maximum)}" + (", or math.inf" if endless else "")
    if hasattr(value, "total_seconds"):
        allowed += "; of a timedelta, .total_seconds()"
    result = number(argument, value, allowed)
    if endless and result == math.inf:
        return result
    if not minimum <= result <= maximum:
        raise InvalidArgument(argument, value, allowed)
    return result


def amount(argument: str, value: object, *, minimum: float = 0.0, maximum: float = 1e15) -> float:
    """Check a real number within bounds, such as a weight or a cost."""
    allowed = f"a number from {_plainly(minimum)} to {_plainly(maximum)}"
    result = number(argument, value, allowed)
    if not minimum <= result <= maximum:
        raise InvalidArgument(argument, value, allowed)
    return result


def count(argument: str, value: object, *, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
    """Check a whole number within bounds, such as a size or a capacity."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not minimum <= int(value) <= maximum:
        raise InvalidArgument(argument, value, f"a whole number from {minimum} to {maximum}")
    return int(value)


def choice(argument: str, value: object, options: type[E]) -> E:
    """Check for a member of an Enum; its plain value is taken as well."""
    if isinstance(value, options):
        return value
    for option in options:
        if isinstance(value, str) and option.value == value:
            return option
    raise InvalidArgument(argument, value, "one of " + ", ".join(repr(option.value) for option in options))


def flag(argument: str, value: object) -> bool:
    """Check for a bool, and nothing that is merely true or false."""
    if not isinstance(value, bool):
        raise InvalidArgument(argument, value, "True or False")
    return value


def _plainly(bound: float) -> str:
    return f"{bound:.16g}"  # up to 10^16 without an exponent
