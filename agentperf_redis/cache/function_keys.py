"""Keys of calls: a function's name with a digest of its arguments in canonical form."""

from __future__ import annotations

from typing import Final

from agentperf_redis.cache.function_identity import digest
from agentperf_redis.codec.codec import canonical
from agentperf_redis.codec.storable import REGISTRY, Registry
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.program import module_of, program_of

DIGEST_BYTES: Final = 16
"""128 bits: the probability that any two of 10^12 keys collide is 10^-15."""
_CLASS: Final = b"\xc1"
"""Precedes a class. No canonical form begins with this byte, so no string has the same form as a class."""


def function_key(name: str, counted: object, registry: Registry = REGISTRY, *, ordered: str = "") -> str:
    """Return the key of a function's arguments: its name and a digest of their canonical form.

    Args:
        name: name of the function.
        counted: the arguments to include. In a dict, each is encoded separately, so that an error names the argument.
        registry: the user classes whose values can be encoded.
        ordered: name of the parameter ``**kwargs``; empty if there is none. The function sees the order of these items
            (PEP 468), so the order is part of the key.
    """
    if not isinstance(counted, dict):
        return f"{name}:{digest(canonical(counted, registry), DIGEST_BYTES)}"
    parts = []
    for argument, value in counted.items():
        try:
            if isinstance(value, type):  # a class, such as cls of a class method, is identified by its name
                known = f"{module_of(value)}.{value.__qualname__}"
                outer, local, _ = known.rpartition("<locals>")
                # A class that is defined in a function is accepted only if the cached function is defined in the same
                # function. The name of the class is then as unique as `name`, the name of the cached function.
                if local and not name.startswith(outer + local):
                    raise InvalidArgument(argument, value, "a class that its name identifies")
                parts.append(_CLASS + program_of(value) + canonical((argument, known), registry))
            else:
                parts.append(canonical((argument, value), registry))
                if argument == ordered and list(value) != sorted(value):  # `canonical` sorts a dict, so add the order
                    parts.append(canonical(list(value), registry))
        except InvalidArgument as error:
            allowed = (
                f"a value that can be part of a cache key; give its class a __cache_key__(), or ignore=({argument!r},)"
            )
            raise InvalidArgument(argument, value, allowed) from error
    return f"{name}:{digest(b''.join(parts), DIGEST_BYTES)}"
