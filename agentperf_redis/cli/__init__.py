"""The command `agentperf`. It needs the extra ``cli``; the rest of the library does not."""

from __future__ import annotations

import sys
import warnings

from agentperf_redis.extras import install_command


def main() -> None:
    """Run the command line."""
    try:
        from agentperf_redis.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(f"agentperf needs typer and rich: {install_command('cli')}\n")
        sys.exit(1)
    warnings.formatwarning = _short
    app(prog_name="agentperf")


def _short(
    message: Warning | str,
    category: type[Warning],  # noqa: ARG001
    filename: str,  # noqa: ARG001
    lineno: int,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> str:
    """Format a warning without the place in the code, which says nothing to the user of a command."""
    return f"agentperf: warning: {message}\n"
