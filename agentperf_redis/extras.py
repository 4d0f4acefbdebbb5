"""Optional packages: if one is missing, the error of its import shows the command that installs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed. The message names the package and the command that installs it."""


def install_command(name: str) -> str:
    """Return the command that installs the packages of an extra."""
    return f'pip install "agentperf-redis[{name}]"'


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Return a context manager for the imports of an extra's packages. It reports a missing package as MissingExtra.

    Raises:
        MissingExtra: A package other than agentperf_redis was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "agentperf_redis":
            raise
        package = error.name.partition(".")[0]
        text = f"this needs the package {package}: {install_command(name)}"
        raise MissingExtra(text, name=error.name) from error
