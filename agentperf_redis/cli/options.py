"""The options that commands share, and how a command is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from agentperf_redis.cli.console import Exit, guarded

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Server. Default: $AGENTPERF_REDIS_URL, $REDIS_URL, a running embedded server, redis://localhost:6379/0.",
        metavar="URL",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", help="Prefix of all keys. Default: $AGENTPERF_NAMESPACE, agentperf.", metavar="NAME"),
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds one command may take.", metavar="SECONDS")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the embedded server's data. Default: one per user.", metavar="DIR"),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask. Needed where nobody can be asked.")]


def do(work: Callable[[], Exit | None]) -> None:
    """Do the work of a command and leave with its exit code."""
    raise typer.Exit(guarded(work))
