"""The registry of storable user classes, by name. Decoding creates objects of registered classes only."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from enum import Enum, Flag
from functools import cached_property, partial
from typing import Any, TypeVar

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument, Undecodable, shown

C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True, slots=True)
class Storable:
    """The functions that convert instances of one user class to stored values and back."""

    cls: type
    name: str
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


class Registry:
    """The storable user classes, by name.

    Registration is explicit. `Codec.encode` refuses an instance of an unregistered class. Stored bytes with an unknown
    name cannot be decoded, and a cache treats them as a miss.
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
        """Register a class as storable. Usable as a class decorator.

        An Enum member is stored by its name, a NamedTuple by its fields, and a dataclass or pydantic model by all of
        its attributes, private ones included. Decoding does not run ``__init__`` or validators, because the instance
        was valid when it was stored. If the fields of the class change, instances stored before the change can no
        longer be decoded. A generic pydantic model is registered with its parameters: ``storable(Box[int])``.

        Args:
            cls: an Enum, dataclass, NamedTuple or pydantic model; or any class with `dump` and `load`.
            name: the stored name of the class; by default its module and qualified name. An explicit name remains
                valid when the class moves.
            dump: turns an instance into a storable value.
            load: turns that value into an instance; may raise on an invalid value.

        Returns:
            The class itself.

        Raises:
            InvalidArgument: the class is of a kind that requires `dump` and `load`, or another class already has this
                name.
        """
        if not isinstance(cls, type):
            raise InvalidArgument("cls", cls, "a class")
        for which, function in (("dump", dump), ("load", load)):
            if function is not None:
                arguments.callback(which, function, "a blocking function, since values are encoded synchronously")
        if (dump is None) != (load is None):
            raise InvalidArgument("load" if load is None else "dump", None, "dump and load together, or neither")
        own_name = f"{cls.__module__}.{cls.__qualname__}"
        name = arguments.name("name", own_name if name is None else name)
        if dump is None or load is None:
            dump, load = _converters(cls)
        else:
            load = partial(_loaded, cls, load)
        taken = self._by_name.get(name)
        if taken is not None and f"{taken.cls.__module__}.{taken.cls.__qualname__}" != own_name:
            raise InvalidArgument("name", name, f"a name other than that of {taken.cls.__qualname__}")
        storable = Storable(cls, name, dump, load)
        self._by_class[cls] = self._by_name[name] = storable
        return cls

    def of_class(self, cls: type) -> Storable | None:
        """Return the registration of exactly this class, not of a base class; None if there is none."""
        return self._by_class.get(cls)

    def of_name(self, name: str) -> Storable | None:
        """Return the registration with this name, or None."""
        return self._by_name.get(name)


REGISTRY = Registry()
"""The registry of the process, used by default."""

storable = REGISTRY.add
"""Registers a class as storable: a decorator for Enums, dataclasses, NamedTuples and pydantic models."""


def _converters(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return `dump` and `load` for a class of a supported kind."""
    if issubclass(cls, Enum):
        return member_state, partial(_load_member, cls)
    if dataclasses.is_dataclass(cls):
        return _dataclass_converters(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _items_of, partial(_load_named_tuple, cls)
    if hasattr(cls, "model_construct") and hasattr(cls, "model_fields"):
        return _model_converters(cls)
    raise InvalidArgument(
        "cls", cls, "an Enum, dataclass, NamedTuple or pydantic model, or any class with dump and load"
    )


def _loaded(cls: type, load: Callable[[Any], Any], state: Any) -> Any:
    """Call a user's `load`. Refuse the result if it is an awaitable instead of an instance."""
    instance = load(state)
    if inspect.isawaitable(instance) and not isinstance(instance, cls):
        arguments.close_coroutine(instance)
        raise Undecodable(f"load of {cls.__qualname__} is not a blocking function")
    return instance


def member_state(member: Enum) -> Any:
    """Return the stored form of an Enum member: its name, or ``[value]`` if it has no name; for a Flag, its value.

    Raises:
        InvalidArgument: a call of the class with the member's value does not return an equal member.
    """
    cls = type(member)
    if not isinstance(member, Flag) and cls.__members__.get(member.name) is member:
        return member.name
    # A combination of flags, or a member that `_missing_` created, is identified only by its value.
    try:
        found: object = cls(member.value)
    except (TypeError, ValueError):
        found = None
    if type(found) is not cls or (found is not member and found != member):
        raise InvalidArgument("value", member, f"a member that {cls.__qualname__} returns for its value")
    return member.value if isinstance(member, Flag) else [member.value]


def _load_member(cls: type[Enum], state: Any) -> Enum:
    if isinstance(state, str) and not issubclass(cls, Flag):
        return cls.__members__[state]  # not cls[state], which a metaclass may redefine
    value = state if issubclass(cls, Flag) else state[0]
    member = cls(value)
    if type(member) is not cls:
        raise Undecodable(f"{shown(value)} is not a member of {cls.__qualname__}")
    return member


def _load_named_tuple(cls: Any, items: list[Any]) -> Any:
    if len(items) != len(cls._fields):
        raise Undecodable(f"the fields of {cls.__qualname__} have changed")
    return tuple.__new__(cls, items)


def _items_of(instance: tuple[Any, ...]) -> list[Any]:
    extra = getattr(instance, "__dict__", None)
    if extra:
        raise InvalidArgument("value", instance, f"a named tuple without extra attributes, not {shown(extra)}")
    return list(instance)


def object_state(instance: Any) -> Any:
    """Return the complete state of a dataclass instance: a dict of its fields, or ``[fields, others]``.

    ``others`` is a dict of all other attributes, if there are any. Values of a `functools.cached_property` are omitted,
    because they can be recomputed.

    Raises:
        InvalidArgument: a field has no value.
    """
    cls = type(instance)
    names = [field.name for field in dataclasses.fields(instance)]
    values, unset = {}, []
    for name in names:
        try:
            values[name] = getattr(instance, name)
        except AttributeError:
            unset.append(name)
    if unset:
        raise InvalidArgument("value", instance, f"a {cls.__qualname__} whose field {unset[0]} has a value")
    extra = {name: getattr(instance, name) for name in _slots_of(cls) if hasattr(instance, name)}
    extra |= getattr(instance, "__dict__", {})
    others = {name: it for name, it in extra.items() if name not in values and not _is_cached_property(cls, name)}
    return [values, others] if others else values


def _slots_of(cls: type) -> list[str]:
    """Return the attribute names of all slots of a class."""
    found = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return found


def _is_cached_property(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name, None), cached_property)


def _dataclass_converters(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    built_in = next((base for base in cls.__mro__[:-1] if not base.__flags__ & _MADE_BY_CLASS_STATEMENT), None)
    if built_in is not None:
        allowed = f"a dataclass that is not also a {built_in.__name__}, whose contents are not fields; or dump and load"
        raise InvalidArgument("cls", cls, allowed)
    names = {field.name for field in dataclasses.fields(cls)}

    def load(state: Any) -> Any:
        values, others = state if isinstance(state, list) else (state, {})
        if set(values) != names:
            raise Undecodable(f"the fields of {cls.__qualname__} have changed")
        instance: Any = object.__new__(cls)
        for name, value in (*values.items(), *others.items()):
            object.__setattr__(instance, name, value)
        return instance

    return object_state, load


_MADE_BY_CLASS_STATEMENT = 1 << 9
"""The flag Py_TPFLAGS_HEAPTYPE of CPython. It is not set for static types written in C: dict, list, Exception."""


def _model_converters(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return `dump` and `load` for a pydantic model. Both use the pickle state of the model, which is complete.

    The pickle state includes aliased, private and extra attributes, and the names of the fields that were set.
    """
    fields = set(cls.model_fields)

    def dump(instance: Any) -> list[Any]:
        state = instance.__getstate__()
        if not isinstance(state, dict) or "__pydantic_fields_set__" not in state:
            return [state]  # the class has its own __getstate__, and its __setstate__ accepts the result
        held = state.get("__dict__") or {}
        values = {name: it for name, it in held.items() if not _is_cached_property(cls, name)}
        return [{**state, "__dict__": values}, sorted(fields - set(values)), sorted(set(values) - fields)]

    def load(stored: list[Any]) -> Any:
        state, *known = stored
        if known:
            unset, others = known
            if (set(state["__dict__"]) - set(others)) | set(unset) != fields:
                raise Undecodable(f"the fields of {cls.__qualname__} have changed")
        instance = cls.__new__(cls)
        instance.__setstate__(state)
        return instance

    return dump, load
