"""Helpers for commands that need the packages of an extra other than ``cli``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer

from agentperf_redis.cli.console import Exit, err
from agentperf_redis.extras import MissingExtra, extra


def failed(message: str) -> NoReturn:
    """Report a failure on stderr, and end the command with the exit code for it."""
    err.print(f"agentperf: {message}", style="red")
    raise typer.Exit(Exit.FAILURE)


@contextlib.contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """If an import in the block does not find a package, end the command and report how to install the package."""
    try:
        with extra(name):
            yield
    except MissingExtra as error:
        failed(str(error))
