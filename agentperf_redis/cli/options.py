"""The options that commands share, and the way a command exits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from agentperf_redis.backend import DEFAULT_DEADLINE_S
from agentperf_redis.cli.console import Exit, Target, guarded

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
Timeout = Annotated[float, typer.Option("--timeout", help="Maximum duration of one command.", metavar="SECONDS")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the embedded server's data. Default: one per user.", metavar="DIR"),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation. Required without a terminal.")]


def do(work: Callable[[], Exit | None]) -> None:
    """Run a command and exit with its exit code."""
    raise typer.Exit(guarded(work))


_SERVER_OPTIONS = tuple(
    Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in (
        ("url", None, Url),
        ("namespace", None, Namespace),
        ("timeout", DEFAULT_DEADLINE_S, Timeout),
        ("as_json", False, Json),
    )
)


def on_server(body: Callable[..., Exit | None]) -> Callable[..., None]:
    """Turn a function of a `Target` into a command that also has --url, --namespace, --timeout and --json."""
    signature = inspect.signature(body, eval_str=True)
    own = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in list(signature.parameters.values())[1:]]
    parameters = [*own, *_SERVER_OPTIONS]

    @functools.wraps(body)
    def command(*, url: str | None, namespace: str | None, timeout: float, as_json: bool, **own_options: Any) -> None:
        target = Target(url, namespace, timeout, as_json=as_json)
        do(lambda: body(target, **own_options))

    # Typer reads the options of a command from both attributes.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # unknown to mypy
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
