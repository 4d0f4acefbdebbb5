"""The classes of users that may be stored, each under a name: the only way by which stored bytes become an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum, Flag
from typing import Any, TypeVar

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument, Undecodable

C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True, slots=True)
class Storable:
    """How instances of one class of a user's are taken apart and put together again."""

    cls: type
    name: str
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


class Registry:
    """The classes of users that may be stored, each under a name.

    Nothing is guessed: a class that was not added is refused by `Codec.encode`, and a name that is not known makes
    bytes undecodable, which a cache takes for a miss.
    """

    def __init__(self) -> None:
        self._by_class: dict[type, Storable] = {}
        self._by_name: dict[str, Storable] = {}

    def add(
        self,
        cls: C,
        *,
        name: str | None = None,
        dump: Callable[[Any], Any] | None = None,
        load: Callable[[Any], Any] | None = None,
    ) -> C:
        """Allow instances of a class to be stored; may stand above the class as a decorator.

        An Enum is stored by the name of its member, a dataclass, NamedTuple or pydantic model by its fields; it comes
        back without its ``__init__`` or validators running, since it was valid when it went in. When the fields have
        changed meanwhile, what is stored becomes undecodable.

        Args:
            cls: an Enum, dataclass, NamedTuple or pydantic model; any class with `dump` and `load`.
            name: what to store as its name; by default its module and qualified name. A name of your own survives
                moving the class.
            dump: turns an instance into a value that can be stored.
            load: turns that value into the instance; may raise on a value it does not like.

        Returns:
            The class itself.

        Raises:
            InvalidArgument: not one of these classes, or the name is taken.
        """
        if not isinstance(cls, type):
            raise InvalidArgument("cls", cls, "a class")
        if (dump is None) != (load is None):
            raise InvalidArgument("load" if load is None else "dump", None, "dump and load together, or neither")
        own_name = f"{cls.__module__}.{cls.__qualname__}"
        name = arguments.name("name", own_name if name is None else name)
        if dump is None or load is None:
            dump, load = _ways_of(cls)
        taken = self._by_name.get(name)
        if taken is not None and f"{taken.cls.__module__}.{taken.cls.__qualname__}" != own_name:
            raise InvalidArgument("name", name, f"a name other than that of {taken.cls.__qualname__}")
        storable = Storable(cls, name, dump, load)
        self._by_class[cls] = self._by_name[name] = storable
        return cls

    def of_class(self, cls: type) -> Storable | None:
        """Return how to store instances of exactly this class, or None."""
        return self._by_class.get(cls)

    def of_name(self, name: str) -> Storable | None:
        """Return the class stored under a name, or None."""
        return self._by_name.get(name)


REGISTRY = Registry()
"""The registry of the process, used where none is given."""

storable = REGISTRY.add
"""Allows instances of a class to be stored: a decorator for Enums, dataclasses, NamedTuples and pydantic models."""


def _ways_of(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return how to take instances apart and put them together, for the kinds of classes that say it themselves."""
    if issubclass(cls, Flag):
        return (lambda member: member.value), cls
    if issubclass(cls, Enum):
        return (lambda member: member.name), cls.__getitem__
    if dataclasses.is_dataclass(cls):
        return _ways_of_dataclass(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return list, getattr(cls, "_make")  # noqa: B009  mypy knows no tuple with it
    if hasattr(cls, "model_construct") and hasattr(cls, "model_fields"):
        return _ways_of_model(cls)
    raise InvalidArgument(
        "cls", cls, "an Enum, dataclass, NamedTuple or pydantic model, or any class with dump and load"
    )


def _ways_of_dataclass(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    names = tuple(field.name for field in dataclasses.fields(cls))

    def dump(instance: Any) -> dict[str, Any]:
        return {name: getattr(instance, name) for name in names}

    def load(state: dict[str, Any]) -> Any:
        if set(state) != set(names):
            raise Undecodable(f"the fields of {cls.__qualname__} have changed")
        instance: Any = object.__new__(cls)
        for name in names:
            object.__setattr__(instance, name, state[name])
        return instance

    return dump, load


def _ways_of_model(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    names = tuple(cls.model_fields)

    def dump(instance: Any) -> list[Any]:
        values = {name: getattr(instance, name) for name in names}
        return [values, instance.model_extra or {}, sorted(instance.model_fields_set)]

    def load(state: list[Any]) -> Any:
        values, extra, given = state
        if set(values) != set(names):
            raise Undecodable(f"the fields of {cls.__qualname__} have changed")
        return cls.model_construct(_fields_set=set(given), **values, **extra)

    return dump, load
