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
from agentperf_redis.cli.console import Exit, Target, WrongUsage, guarded

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
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        help=f"Maximum duration of one request to the server. Default: {DEFAULT_DEADLINE_S:g}.",
        metavar="SECONDS",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the embedded server's data. Default: one per user.", metavar="DIR"),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation. Required without a terminal.")]
Window = Annotated[
    str | None,
    typer.Option("--window", help="The last 30s, 5m, 1h, 3d, or seconds. Default: all time.", metavar="TIME"),
]
AsOf = Annotated[
    str | None,
    typer.Option(
        "--as-of",
        help="End of the window: 2026-11-29T15:00 (local time without a zone), seconds since 1970, or '2h ago'. "
        "Default: now.",
        metavar="TIME",
    ),
]


def group(help_: str) -> typer.Typer:
    """Make a group of commands. The options that name a server may also stand before the name of a command."""
    made = typer.Typer(help=help_, no_args_is_help=True, rich_markup_mode=None)
    made.callback()(_before_command)
    return made


def _before_command(
    url: Url = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
    as_json: Json = False,
) -> None:
    """Accept the options that name a server before a command. `outer_option` reads them."""


def outer_option(context: typer.Context, name: str) -> Any:
    """Return the value that an option has before the command: the nearest one if there are several, or None."""
    outer: Any = context.parent
    while outer is not None:
        if outer.params.get(name):
            return outer.params[name]
        outer = outer.parent
    return None


def do(work: Callable[[], Exit | None]) -> None:
    """Run a command and exit with its exit code."""
    raise typer.Exit(guarded(work))


def do_locally(context: typer.Context, work: Callable[[bool], Exit | None], *, as_json: bool) -> None:
    """Run a command that takes --json, but none of the options that name a server, and exit with its exit code."""

    def checked() -> Exit | None:
        for name in ("url", "namespace", "timeout"):
            if outer_option(context, name) is not None:
                raise WrongUsage(f"`agentperf {context.info_name}` takes no --{name}")
        return work(as_json or bool(outer_option(context, "as_json")))

    do(checked)


_SERVER_OPTIONS = tuple(
    Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in (
        ("url", None, Url),
        ("namespace", None, Namespace),
        ("timeout", None, Timeout),
        ("as_json", False, Json),
    )
)
_CONTEXT = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)


def on_server(body: Callable[..., Exit | None]) -> Callable[..., None]:
    """Turn a function that takes a `Target` first into a command with --url, --namespace, --timeout and --json.

    Each of these options may also stand before the command. The value after the command wins.
    """
    signature = inspect.signature(body, eval_str=True)
    own = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in list(signature.parameters.values())[1:]]
    parameters = [_CONTEXT, *own, *_SERVER_OPTIONS]

    @functools.wraps(body)
    def command(*, context: typer.Context, as_json: bool, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in ("url", "namespace", "timeout")}
        for name, value in chosen.items():
            chosen[name] = outer_option(context, name) if value is None else value
        if chosen["timeout"] is None:
            chosen["timeout"] = DEFAULT_DEADLINE_S
        target = Target(**chosen, as_json=as_json or bool(outer_option(context, "as_json")))

        code = guarded(lambda: body(target, **given))
        if code is Exit.NOT_FOUND:
            target.hint()
        raise typer.Exit(code)

    # Typer reads the options of a command from both attributes.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # unknown to mypy
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
