"""`agentperf top`: the terminal view, or one line for each reading if there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cli.console import Exit, Target, err, out, print_json_line
from agentperf_redis.cli.extras import needs_extra
from agentperf_redis.cli.options import on_server
from agentperf_redis.cli.times import parsed_window
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.views.timeline import DEFAULT_WINDOW
from agentperf_redis.windows import length_text, window_seconds

if TYPE_CHECKING:  # not imported at run time, so that other commands start sooner
    from agentperf_redis.views.overview import Overview


@on_server
def top(
    target: Target,
    window: Annotated[
        str, typer.Option("--window", help="The last 5m, 10m, 1h, 2h, 24h, 7d, or seconds.", metavar="TIME")
    ] = DEFAULT_WINDOW,
    every: Annotated[
        float, typer.Option("--every", help="Pause between two readings.", min=0.5, max=3600, metavar="SECONDS")
    ] = 2.0,
    count: Annotated[
        int | None, typer.Option("--count", help="Print this many lines and end.", min=1, metavar="N")
    ] = None,
) -> Exit | None:
    """Show agents, caches, pools and alerts live, in tabs; enter opens one, q quits, and ? shows all keys.

    Without a terminal, with --count or with --json, print a line for each reading instead.
    """
    shown = _with_unit(window)
    with target.connect() as perf:
        if target.as_json or count is not None or not _is_terminal():
            return _print(target, perf, shown, every, count)
        with needs_extra("top"):
            from agentperf_redis.top.app import TopApp
        app = TopApp(perf, shown, every)
        app.run()
        return Exit(app.return_code or 0)


def _with_unit(window: str) -> str:
    """Check a window, and return it with a unit: ``5m`` for ``300``."""
    parsed = parsed_window(window)
    length_s = window_seconds(window if parsed is None else parsed)
    return window if isinstance(parsed, str) else length_text(round(length_s * 1000))


def _is_terminal() -> bool:
    """Return whether a screen can be shown. The library Textual reads stdin and writes to stderr."""
    return all(each.isatty() for each in (sys.stdin, sys.stdout, sys.stderr)) and os.environ.get("TERM") != "dumb"


def _print(target: Target, perf: AgentPerf, window: str, every: float, count: int | None) -> Exit:
    from agentperf_redis.views.overview import NO_CHANGES, overview

    printed, fault = 0, ""
    while count is None or printed < count:
        began = time.monotonic()
        try:
            found = perf.backend.run(overview(perf, window, known_changes=NO_CHANGES, charts=False))
        except BackendUnavailable as error:
            if count is not None:  # with --count, the reader may be a script: end at the first fault
                raise
            if not fault:
                err.print(f"agentperf: {error}; trying again", style="red")
            fault = str(error)
        else:
            fault = ""
            _show(target, found, printed)
            printed += 1
        if count is None or printed < count:
            time.sleep(max(0.0, every - (time.monotonic() - began)))
    return Exit.OK


def _show(target: Target, found: Overview, printed: int) -> None:
    from agentperf_redis.top import lines

    if target.as_json:
        print_json_line("top", lines.plain(found))
        return
    if printed % lines.HEAD_EVERY == 0:
        out.print(lines.head(out.width), soft_wrap=True)
    out.print(lines.line(found, out.width), soft_wrap=True)
    out.file.flush()
    for fault in found.faults:
        err.print(f"agentperf: {fault.part} could not be read: {fault.text}", style="red")
