"""Helpers for commands that need the packages of an extra other than ``cli``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer

from agentperf_redis.cli.console import Exit, err


def failed(message: str) -> NoReturn:
    """Report a failure on stderr, and end the command with the exit code for it."""
    err.print(f"agentperf: {message}", style="red")
    raise typer.Exit(Exit.FAILURE)


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """If an import in the block does not find a package, end the command and report how to install the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("agentperf_redis"):
            raise
        failed(f'this needs the package {error.name.partition(".")[0]}: pip install "agentperf-redis[{extra}]"')
