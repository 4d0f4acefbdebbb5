"""The path of an item within a value, for error messages. It is in Python notation: ``value['files'][3].lines``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Final

PLACE: Final = "; it is at "
"""Precedes the path of an item in the text of an error."""
_MAX_STEPS: Final = 100_000
"""Maximum number of items visited. If the item is not found by then, the message has no path: a longer search could
take seconds."""
_MAX_CHARACTERS: Final = 60
"""Maximum length of a key in a path."""


def path_of(item: object, value: object, name: str = "value") -> str:
    """Return the path of an item, or the name alone if the item is the value itself or was not found.

    Args:
        item: the item, compared by identity.
        value: a nesting of lists, tuples, dicts, sets, dataclasses, named tuples and models.
        name: the name of the value.
    """
    waiting: list[tuple[str, Any]] = [(name, value)]
    visited: set[int] = set()
    for _ in range(_MAX_STEPS):
        if not waiting:
            return name
        path, found = waiting.pop()
        if found is item:
            return path
        if id(found) not in visited:
            visited.add(id(found))
            with suppress(Exception):  # a property or a __getattr__ of the user may raise
                waiting += _inside(path, found)
    return name


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"a key of {path}", key
            yield f"{path}[{_short(key)}]", item
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f"{path}.{field}", item) for field, item in zip(value._fields, value, strict=False))
    elif isinstance(value, (list, tuple)):
        yield from ((f"{path}[{at}]", item) for at, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"an item of {path}", item) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f"{path}.{field.name}", getattr(value, field.name, None)) for field in fields(value))
        yield from ((f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items())
    elif hasattr(type(value), "model_fields"):
        for part in ("__dict__", "__pydantic_private__", "__pydantic_extra__"):
            yield from ((f"{path}.{name}", item) for name, item in (getattr(value, part, None) or {}).items())


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."
