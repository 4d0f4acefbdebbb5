"""The identity of a function: the same in every process that runs the program, on any machine.

A function at the top level of a module, or a method of a class there, is identified by its name. For all other
functions, such as lambdas, functions made by a factory and functions typed into a notebook, the name is not enough: a
digest of their code and closure values is added to it. A value in the closure may have no identity; a connection has
none, for example. A function with such a value is refused, because it could get the results of another function. If the
user passes ``name=``, the function is accepted.

Code is compared as bytecode, which differs between minor versions of Python. Processes that run different versions
therefore share no results of functions that need a digest.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from agentperf_redis.codec.codec import canonical
from agentperf_redis.codec.storable import REGISTRY, Registry
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.program import module_of, program_of

_DIGEST_BYTES: Final = 8
"""64 bits are enough, since few functions have the same name."""


_CLIENTS: Final = frozenset(
    (
        *("AgentPerf", "LRUCache", "AsyncLRUCache", "TieredCache", "AsyncTieredCache"),
        *("MetricsCollector", "LoadBalancer", "AsyncLoadBalancer"),
    )
)
"""Classes of this library whose objects are identified by name, server and namespace."""
_THIS_LIBRARY: Final = __name__.partition(".")[0] + "."


class _NoIdentity(Exception):
    """A value without an identity."""

    def __init__(self, value: object) -> None:
        super().__init__(value)
        self.value = value


def function_name(function: Any, registry: Registry = REGISTRY) -> str:
    """Return the name of a function, followed by a digest if another function could have the same name.

    Args:
        function: a callable with a ``__qualname__``.
        registry: the user classes whose values can be encoded.

    Raises:
        InvalidArgument: the function uses a value without an identity.
    """
    try:
        return _Namer(registry).name(function)
    except _NoIdentity as refused:
        kind = type(refused.value)
        allowed = (
            f"a function that can be distinguished from others of its name; it uses a {kind.__module__}."
            f"{kind.__qualname__} without an identity: pass that as an argument, give its class a __cache_key__(), or "
            "give name='...'"
        )
        raise InvalidArgument("function", function, allowed) from None


def code_digest(function: Any) -> str:
    """Return a digest of a function's bytecode. It is empty if there is no bytecode, as for a function written in C."""
    code = getattr(function, "__code__", None)
    return "" if code is None else _digest_of_parts([*_parts_of_code(code)])


def digest(data: bytes, size_bytes: int) -> str:
    """Return a hash of `size_bytes` bytes, as hexadecimal text."""
    return hashlib.blake2b(data, digest_size=size_bytes).hexdigest()


def _digest_of_parts(parts: list[bytes]) -> str:
    return digest(canonical(parts), _DIGEST_BYTES)


class _Namer:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._under_way: set[int] = set()
        """Ids of the functions that are being named. So the recursion ends if a function refers to itself."""

    def name(self, function: Any) -> str:
        if isinstance(function, MethodType):
            # The object of a bound method is not an argument, so the name contains a digest of the object.
            return f"{self.name(function.__func__)}#{_digest_of_parts([self._value(function.__self__)])}"
        module = module_of(function)
        name = f"{module}.{function.__qualname__}"
        known = "<" not in function.__qualname__ and module not in ("__main__", "None")
        cells = dict(_cells_of(function))
        program = program_of(function)
        if known and not cells and not program:
            return name
        if id(function) in self._under_way:
            return "itself"
        self._under_way.add(id(function))
        parts = [program] if program else []
        # functools.wraps gives a wrapper the name of the wrapped function. This name does not identify the wrapper.
        if not known or hasattr(function, "__wrapped__"):
            parts += _parts_of_code(getattr(function, "__code__", None))
        parts += (variable.encode() + b"=" + self._cell(function, variable, cell) for variable, cell in cells.items())
        parts += self._attributes(function)
        if module == "__main__":
            parts += self._globals(function)
        self._under_way.discard(id(function))
        return f"{name}#{_digest_of_parts(parts)}" if parts else name

    def _cell(self, function: Any, variable: str, cell: CellType) -> bytes:
        try:
            value = cell.cell_contents
        except ValueError:  # the variable has no value yet
            if variable == function.__name__:  # a recursive function, which is not bound to its variable yet
                return b"itself"
            raise _NoIdentity(_Unbound()) from None
        return self._value(value)

    def _attributes(self, function: Any) -> Iterator[bytes]:
        """Yield the attributes of a function that its own code may read. Others, set by decorators, are left out."""
        values = getattr(function, "__dict__", {})
        for name in sorted(_names_in(getattr(function, "__code__", None)) & values.keys() - {"__wrapped__"}):
            yield b"." + name.encode() + b"=" + self._value(values[name])

    def _globals(self, function: Any) -> Iterator[bytes]:
        """Yield the global values that code typed into a session uses. Other code is identified by its module."""
        code = getattr(function, "__code__", None)
        around = getattr(function, "__globals__", {})
        for variable in sorted(_names_in(code) & around.keys() - {function.__name__}):
            yield variable.encode() + b"=" + self._value(around[variable])

    def _value(self, value: Any) -> bytes:
        identity = self._identity(value)
        return canonical(value if identity is None else (type(value).__name__, *identity), self._registry)

    def _identity(self, value: Any) -> tuple[Any, ...] | None:
        """Return the identity of a value that is not data; None for data."""
        if isinstance(value, FunctionType):
            return (self.name(value),)
        if isinstance(value, MethodType):
            return (self.name(value.__func__), self._value(value.__self__))
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            return (value.__qualname__, owner.__name__ if isinstance(owner, ModuleType) else self._value(owner))
        if isinstance(value, functools.partial):
            keywords = sorted(value.keywords.items())
            return (self._value(value.func), *map(self._value, value.args), *((k, self._value(v)) for k, v in keywords))
        if isinstance(value, type):
            if "<locals>" in value.__qualname__:
                raise _NoIdentity(value)
            return (module_of(value), value.__qualname__, program_of(value))
        if isinstance(value, ModuleType):
            return (value.__name__,)
        if isinstance(value, logging.Logger):
            return (value.name,)
        if type(value).__module__.startswith(_THIS_LIBRARY) and type(value).__name__ in _CLIENTS:
            backend = getattr(value, "backend", None) or value._backend  # noqa: SLF001  same package
            return (str(getattr(value, "name", "")), backend.address.masked, backend.namespace)
        try:
            canonical(value, self._registry)
        except InvalidArgument:
            raise _NoIdentity(value) from None
        return None


class _Unbound:
    """Stands for a variable of the enclosing function that has no value when the function is decorated."""


def _cells_of(function: Any) -> Iterator[tuple[str, CellType]]:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and closure:
        # A function that calls super() has a cell __class__. This cell is left out, since the name of the function
        # contains the class.
        yield from ((name, cell) for name, cell in zip(code.co_freevars, closure, strict=True) if name != "__class__")


def _names_in(code: CodeType | None) -> set[str]:
    if code is None:
        return set()
    return set(code.co_names).union(*(_names_in(each) for each in code.co_consts if isinstance(each, CodeType)))


def _parts_of_code(code: CodeType | None) -> Iterator[bytes]:
    """Yield everything that determines the behaviour of code, but not its file and line numbers."""
    if code is None:
        return
    yield code.co_code
    yield code.co_exceptiontable
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    yield canonical((*shape, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    yield from map(_constant, code.co_consts)


def _constant(value: Any) -> bytes:
    """Encode a constant of compiled code. Unlike an argument, it may be or contain Ellipsis, a slice or code."""
    if isinstance(value, CodeType):
        return canonical([*_parts_of_code(value)])
    if value is ...:
        return b"..."
    if isinstance(value, slice):
        return b"slice" + canonical([_constant(part) for part in (value.start, value.stop, value.step)])
    if isinstance(value, tuple):
        return b"tuple" + canonical([_constant(part) for part in value])
    if isinstance(value, frozenset):
        return b"set" + canonical(sorted(_constant(part) for part in value))
    return canonical(value)
