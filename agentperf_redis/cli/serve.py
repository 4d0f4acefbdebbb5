"""`agentperf serve`: show the web page until the command is interrupted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from agentperf_redis.cli.console import Exit, Target, WrongUsage, err, out, print_json
from agentperf_redis.cli.extras import failed, needs_extra
from agentperf_redis.cli.options import on_server
from agentperf_redis.errors import InvalidArgument

DEFAULT_PORT = 8420
_TOKEN_VARIABLE = "AGENTPERF_TOKEN"  # noqa: S105  the name of an environment variable


@on_server
def serve(
    target: Target,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on. All but loopback need a token.", metavar="HOST")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0: a free one.", min=0, max=65535, metavar="PORT")] = (
        DEFAULT_PORT
    ),
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            help="Text that users enter to log in, 16 characters or more. Other users of this machine can see options, "
            "so rather use the variable or --token-file.",
            envvar=_TOKEN_VARIABLE,
            show_default=False,
            metavar="TOKEN",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File that holds the token.", metavar="FILE")
    ] = None,
    allow_actions: Annotated[
        bool, typer.Option("--allow-actions", help="Show buttons that silence, drain, mark, delete and clear.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Name by which browsers may call the page, besides localhost. Default: with a token, any.",
            metavar="NAME",
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option("--root-path", help="Path under which a proxy shows the page.", metavar="PREFIX")
    ] = "",
    every: Annotated[
        float, typer.Option("--every", help="Pause between two readings.", min=0.5, max=3600, metavar="SECONDS")
    ] = 2.0,
) -> Exit:
    """Show all services as a web page, until ended. It reads only, unless --allow-actions is given.

    /metrics has the metrics for Prometheus. With a token, scrapers send the header "Authorization: Bearer TOKEN".
    """
    with needs_extra("web"):
        from agentperf_redis.web import app, server
        from agentperf_redis.web.settings import is_loopback
    token = _read_token(token, token_file)
    if token is None and not is_loopback(host):
        raise WrongUsage(
            f"other machines can reach --host {host}, so give --token-file, or a token in {_TOKEN_VARIABLE}; "
            "`openssl rand -hex 16` makes one"
        )
    own = f"[{host}]" if ":" in host else host
    hosts = allow_host or None
    if is_loopback(host) and (hosts or token is None):
        hosts = [*(hosts or ()), own]  # a browser that opens 127.0.0.2 sends this address in the Host header
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        raise InvalidArgument("--root-path", root_path, "a path that begins with / and does not end with /")
    with contextlib.ExitStack() as stack:
        perf = stack.enter_context(target.connect(patient=True))
        made = app(perf, token=token, allow_actions=allow_actions, hosts=hosts, refresh=every)
        try:
            listener = stack.enter_context(server.listening(host, port))
        except OSError as error:
            failed(f"cannot listen on {host}:{port}: {error.strerror or error}")
        url = f"http://{own}:{listener.getsockname()[1]}{root_path}/"

        def announce() -> None:
            if target.as_json:
                facts = {"namespace": perf.backend.namespace, "url": url, "login": token is not None}
                print_json("serve", {**facts, "actions": allow_actions})
            else:
                out.print(f"Namespace {perf.backend.namespace}: {url}")
                err.print("Ctrl-C ends it.")
            out.file.flush()

        server.run(made, listener, root_path, announce, perf.aclose)
    return Exit.OK


def _read_token(token: str | None, file: Path | None) -> str | None:
    if file is None:
        return token or None  # an empty environment variable means no token
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidArgument("--token-file", str(file), f"a file that can be read ({reason})") from None
