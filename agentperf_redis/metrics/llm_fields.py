"""Reads the fields of any object, and runs none of the object's code except the code that looks up a field.

A usage may be a mapping, a model of any library, a test's mock, or an object that raises on access. Fields are
therefore looked up where they are stored: in the mapping, in the instance or in its class. Methods that do anything
else are never called. A mock never creates an attribute. A field that raises counts as missing.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import lru_cache, partialmethod
from typing import Any

MAX_DYNAMIC_LOOKS = 256
"""Maximum number of lookups through `__getattr__` in one reading. A normal object takes about 1 us per lookup."""
_MAX_TYPES = 512
"""Maximum number of classes whose fields are cached."""
_ABSENT_NAME = "agentperf_no_such_field"
"""An object that seems to have this field answers to every name."""
_SCALARS = (str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType)
_NOT_DATA = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    classmethod,
    staticmethod,
    partialmethod,
    type,
)


def is_scalar(value: object) -> bool:
    """Return whether a value is a number, a text or another value without fields."""
    return issubclass(type(value), _SCALARS)


class Fields:
    """Looks up fields during one reading of a usage.

    Args:
        known: the names to look up, the most likely first. Fields with other names are ignored.
    """

    def __init__(self, known: tuple[str, ...]) -> None:
        self._order = known
        self._known = _as_set(known)
        self._dynamic_looks = MAX_DYNAMIC_LOOKS
        self._answering: dict[int, object] = {}

    def names(self, source: object) -> frozenset[str]:
        """Return the known names that the object stores; an empty set for numbers, texts, and objects that raise."""
        cls: Any = type(source)
        try:
            if issubclass(cls, _SCALARS):
                return _NOTHING
            if issubclass(cls, dict):
                found = self._known & dict.keys(source)  # type: ignore[arg-type]  # it is a dict
                return frozenset(found if cls is dict else found | (self._known & _own(source).keys()))
            if issubclass(cls, Mapping):
                if _ABSENT_NAME in source:  # type: ignore[operator]
                    return _NOTHING
                return frozenset(name for name in self._order if name in source)  # type: ignore[operator]
            own = _own(source)
            if _MOCK_CHILDREN in own:
                return self._known & {*own, *_children(own), *_mock_class_fields(cls, self._known)}
            found = {*(self._known & own.keys()), *_class_fields(cls, self._known)}
            for hidden in _pydantic_stores(cls):
                found |= self._known & _store(source, hidden).keys()
            return frozenset(found)
        except Exception:  # noqa: BLE001  any access may raise; a field that cannot be read counts as missing
            return _NOTHING

    def get(self, source: object, name: str) -> Any:
        """Return the value of a field; None if the field is not stored."""
        cls: Any = type(source)
        try:
            if issubclass(cls, dict):
                found = dict.get(source, name)  # type: ignore[call-overload]  # it is a dict
                return _own(source).get(name) if found is None and cls is not dict else found
            if issubclass(cls, Mapping):
                return source[name]  # type: ignore[index]
            own = _own(source)
            if name in own:
                return own[name]
            mocked = _MOCK_CHILDREN in own
            if mocked and name in (children := _children(own)):
                return children[name]
            for hidden in _pydantic_stores(cls) if not mocked else ():
                if name in (store := _store(source, hidden)):
                    return store[name]
            stored = (_mock_class_fields if mocked else _class_fields)(cls, self._known)
            return getattr(source, name) if name in stored or id(source) in self._answering else None
        except Exception:  # noqa: BLE001  as above
            return None

    def dynamic_names(self, source: object) -> frozenset[str]:
        """Return the known names that the object provides through `__getattr__`, as wrappers do.

        The set is empty if the object answers to every name.
        """
        cls: Any = type(source)
        try:
            if issubclass(cls, _SCALARS) or _MOCK_CHILDREN in _own(source) or not _answers_by_code(cls):
                return _NOTHING
            if self._dynamic_looks <= 0 or self._has(source, _ABSENT_NAME):
                return _NOTHING
            found = frozenset(name for name in self._order if self._dynamic_looks > 0 and self._has(source, name))
            self._answering[id(source)] = source
            return found
        except Exception:  # noqa: BLE001  as above
            return _NOTHING

    def _has(self, source: object, name: str) -> bool:
        self._dynamic_looks -= 1
        try:
            getattr(source, name)
        except Exception:  # noqa: BLE001  as above
            return False
        return True


@lru_cache(maxsize=1)
def _as_set(known: tuple[str, ...]) -> frozenset[str]:
    return frozenset(known)


_NOTHING: frozenset[str] = frozenset()
_MOCK_CHILDREN = "_mock_children"
"""Attribute of every `unittest.mock` object that holds its existing child attributes."""
_PYDANTIC_STORES = ("__pydantic_extra__", "__pydantic_private__")


def _own(source: object) -> Mapping[str, Any]:
    try:
        own = object.__getattribute__(source, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


def _children(own: Mapping[str, Any]) -> Mapping[str, Any]:
    children = own[_MOCK_CHILDREN]
    return children if isinstance(children, dict) else {}


def _store(source: object, name: str) -> Mapping[str, Any]:
    """Return the fields that pydantic stores outside the instance's `__dict__`."""
    try:
        store = object.__getattribute__(source, name)
    except AttributeError:
        return {}
    return store if isinstance(store, dict) else {}


@lru_cache(maxsize=_MAX_TYPES)
def _class_fields(cls: type, known: frozenset[str]) -> frozenset[str]:
    """Return the names for which a class has data: slots, properties or plain values, but not methods."""
    found: set[str] = set()
    hidden: set[str] = set()
    for base in cls.__mro__:
        for name in known & base.__dict__.keys():
            if name not in found and name not in hidden:
                (hidden if isinstance(base.__dict__[name], _NOT_DATA) else found).add(name)
        descriptor = base.__dict__.get("DESCRIPTOR")  # a protobuf message lists its fields only in DESCRIPTOR
        found |= known & set(getattr(descriptor, "fields_by_name", ()))
    return frozenset(found)


def _mock_class_fields(cls: type, known: frozenset[str]) -> frozenset[str]:
    """Do the same as `_class_fields` for a mock. It has a class of its own, so only its base classes are cached."""
    own = {name for name in known & cls.__dict__.keys() if not isinstance(cls.__dict__[name], _NOT_DATA)}
    return frozenset(own.union(*(_class_fields(base, known) for base in cls.__bases__)))


@lru_cache(maxsize=_MAX_TYPES)
def _pydantic_stores(cls: type) -> tuple[str, ...]:
    return tuple(name for name in _PYDANTIC_STORES if any(name in base.__dict__ for base in cls.__mro__))


@lru_cache(maxsize=_MAX_TYPES)
def _answers_by_code(cls: type) -> bool:
    return any(
        "__getattr__" in base.__dict__ or ("__getattribute__" in base.__dict__ and base is not object)
        for base in cls.__mro__
        if base.__module__ != "pydantic.main"  # the `__getattr__` of BaseModel only reads `_PYDANTIC_STORES`
    )
