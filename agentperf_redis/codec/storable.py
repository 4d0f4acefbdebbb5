"""The classes of users that may be stored, each under a name: the only way by which stored bytes become an object."""

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

        An Enum is stored by the name of its member, a dataclass or pydantic model by all of its attributes, private
        ones included, a NamedTuple by its fields. It comes back without its ``__init__`` or validators running, since
        it was valid when it went in. When the fields have changed meanwhile, what is stored becomes undecodable.
        A generic pydantic model is registered with its parameters: ``storable(Box[int])``.

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
        for which, function in (("dump", dump), ("load", load)):
            if inspect.iscoroutinefunction(function):
                raise InvalidArgument(which, function, "a blocking function: a value is taken apart at once")
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
    if issubclass(cls, Enum):
        return member_state, partial(_load_member, cls)
    if dataclasses.is_dataclass(cls):
        return _ways_of_dataclass(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _items_of, partial(tuple.__new__, cls)
    if hasattr(cls, "model_construct") and hasattr(cls, "model_fields"):
        return _ways_of_model(cls)
    raise InvalidArgument(
        "cls", cls, "an Enum, dataclass, NamedTuple or pydantic model, or any class with dump and load"
    )


def member_state(member: Enum) -> Any:
    """Return what identifies a member of its Enum: its name, the value of a Flag, or ``[value]`` if it has no name.

    Raises:
        InvalidArgument: a member that its class does not return for its value.
    """
    cls = type(member)
    if not isinstance(member, Flag) and cls.__members__.get(member.name) is member:
        return member.name
    # A combination of flags, or a member that the class made up in `_missing_`: only its value leads back to it.
    try:
        found: object = cls(member.value)
    except (TypeError, ValueError):
        found = None
    if type(found) is not cls or (found is not member and found != member):
        raise InvalidArgument("value", member, f"a member that {cls.__qualname__} returns for its value")
    return member.value if isinstance(member, Flag) else [member.value]


def _load_member(cls: type[Enum], state: Any) -> Enum:
    if isinstance(state, str) and not issubclass(cls, Flag):
        return cls.__members__[state]  # not cls[state]: a class that is also a str has a __getitem__ of its own
    value = state if issubclass(cls, Flag) else state[0]
    member = cls(value)
    if type(member) is not cls:
        raise Undecodable(f"{shown(value)} is no member of {cls.__qualname__}")
    return member


def _items_of(instance: tuple[Any, ...]) -> list[Any]:
    beside = getattr(instance, "__dict__", None)
    if beside:
        raise InvalidArgument("value", instance, f"a named tuple without further attributes, not {shown(beside)}")
    return list(instance)


def object_state(instance: Any) -> Any:
    """Return the whole state of a dataclass instance: a dict of its fields, or ``[fields, other attributes]``.

    What a `functools.cached_property` keeps is left out: it follows from the rest.

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
    beside = {name: getattr(instance, name) for name in _slots_of(cls) if hasattr(instance, name)}
    beside |= getattr(instance, "__dict__", {})
    others = {name: it for name, it in beside.items() if name not in values and not _is_computed(cls, name)}
    return [values, others] if others else values


def _slots_of(cls: type) -> list[str]:
    """Return the names of all slots of a class, as they are set on instances."""
    found = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return found


def _is_computed(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name, None), cached_property)


def _ways_of_dataclass(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    built_in = next((base for base in cls.__mro__[:-1] if not base.__flags__ & _MADE_BY_CLASS_STATEMENT), None)
    if built_in is not None:
        allowed = f"a dataclass that is not also a {built_in.__name__}, whose contents are no fields; or dump and load"
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
"""Py_TPFLAGS_HEAPTYPE of CPython: not set for types written in C as static ones, such as dict, list, Exception."""


def _ways_of_model(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Use what pydantic's own pickling uses: it holds aliased and private attributes, extras, and what was set."""
    fields = set(cls.model_fields)

    def dump(instance: Any) -> list[Any]:
        state = instance.__getstate__()
        if not isinstance(state, dict) or "__pydantic_fields_set__" not in state:
            return [state]  # the class has a __getstate__ of its own, and its __setstate__ knows what to do with it
        held = state.get("__dict__") or {}
        values = {name: it for name, it in held.items() if not _is_computed(cls, name)}
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
