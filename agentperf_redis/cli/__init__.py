"""The command `agentperf`. It needs the extra ``cli``; the rest of the library does not."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from agentperf_redis.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.stderr.write('agentperf needs typer and rich: pip install "agentperf-redis[cli]"\n')
        sys.exit(1)
    app()
