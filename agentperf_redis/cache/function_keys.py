"""Keys of calls: a function's name with a digest of its arguments in canonical form."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Final

from agentperf_redis.codec.codec import canonical
from agentperf_redis.codec.storable import REGISTRY, Registry
from agentperf_redis.errors import InvalidArgument

_DIGEST_BYTES: Final = 16
"""128 bits: among 10^12 keys two collide with a probability of 10^-15."""
_CLASS: Final = b"\xc1"
"""Stands before a class: no canonical form begins with it, so a class differs from a text that says the same."""


def module_of(thing: Any) -> str:
    """Return the name of the module of a function or class; of a script its file's, since each is called __main__."""
    module: str = thing.__module__
    if module not in _SCRIPTS:
        return module
    script = sys.modules.get(module)
    spec = getattr(script, "__spec__", None)
    path = getattr(script, "__file__", None)
    return spec.name if spec else Path(path).stem if path else module


_SCRIPTS = ("__main__", "__mp_main__")
"""What the script is called in the process that runs it, and in those that multiprocessing has started."""


def function_key(name: str, counted: object, registry: Registry = REGISTRY) -> str:
    """Return the key of a function's arguments: its name and a digest of their canonical form.

    Args:
        name: of the function.
        counted: the arguments that count; a dict by name is checked one by one, so that an error names the argument.
        registry: the classes of users that have a value.
    """
    if not isinstance(counted, dict):
        return f"{name}:{digest(canonical(counted, registry))}"
    parts = []
    for argument, value in counted.items():
        try:
            if isinstance(value, type):  # such as cls of a class method: known by its name
                known = f"{module_of(value)}.{value.__qualname__}"
                outer, local, _ = known.rpartition("<locals>")
                if local and not name.startswith(outer + local):  # beside the function, it is as sure as that
                    raise InvalidArgument(argument, value, "a class that can be told by its name")
                parts.append(_CLASS + canonical((argument, known), registry))
            else:
                parts.append(canonical((argument, value), registry))
        except InvalidArgument as error:
            allowed = (
                f"a value that can be part of a cache key; give its class a __cache_key__(), or ignore=({argument!r},)"
            )
            raise InvalidArgument(argument, value, allowed) from error
    return f"{name}:{digest(b''.join(parts))}"


def digest(data: bytes) -> str:
    """Return 128 bits of a hash, as text."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
