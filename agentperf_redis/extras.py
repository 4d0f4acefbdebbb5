"""Optional packages: an import that finds none is answered with the line that installs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed. The text names the package and the line that installs it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Import the packages of an extra in the block of a `with` statement.

    Raises:
        MissingExtra: A package other than this one was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "agentperf_redis":
            raise
        package = error.name.partition(".")[0]
        text = f'this needs the package {package}: pip install "agentperf-redis[{name}]"'
        raise MissingExtra(text, name=error.name) from error
