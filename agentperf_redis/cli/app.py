"""The commands and their options. The other modules of this package implement the commands.

Exit codes: 0 ok, 1 failure, 2 usage, 3 server unreachable, 4 not found, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentperf_redis.cli import balancer, cache, console, export
from agentperf_redis.cli.console import Exit, Target
from agentperf_redis.cli.options import Data, Json, Yes, do, on_server
from agentperf_redis.metrics.comparison import RankBy

app = typer.Typer(
    name="agentperf",
    help="Metrics, caches and load balancing for fleets of AI agents, shared through one Redis or Valkey.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 server unreachable, 4 not found, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(balancer.app, name="lb")
app.add_typer(cache.app, name="cache")
app.add_typer(export.app, name="export")
app.command()(export.exporter)

Window = Annotated[
    str | None,
    typer.Option("--window", help="The last 30s, 5m, 1h, 3d, or seconds. Default: all time.", metavar="TIME"),
]
Limit = Annotated[int, typer.Option("--limit", help="Maximum number of rows.", min=1, max=1000)]
Agent = Annotated[str, typer.Argument(help="The agent.", metavar="AGENT", show_default=False)]
MaybeAgent = Annotated[str | None, typer.Argument(help="Only this agent. Default: all.", metavar="[AGENT]")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            console.out.print(installed("agentperf-redis"))
        except PackageNotFoundError:  # run from a source tree
            console.out.print("not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Metrics, caches and load balancing for fleets of AI agents, shared through one Redis or Valkey."""


@app.command()
def demo(
    url: Annotated[
        str | None,
        typer.Option("--url", help="Server. Default: a private one that ends with the demo.", metavar="URL"),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--path", help="Source tree to review. Default: the standard library.", metavar="DIR")
    ] = None,
    files: Annotated[int | None, typer.Option("--files", help="Review at most this many files.", min=1)] = None,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes.", min=1, max=64)] = 4,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill one worker half-way through.")] = True,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace", help="Prefix of all keys. Default: with --url a new one, else agentperf.", metavar="NAME"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run code-review agents on a source tree in several workers, and kill one worker half-way through."""
    from agentperf_redis.cli.demo import demo as work

    do(lambda: work(url, path, files, workers, namespace, kill=kill, as_json=as_json))


@app.command()
def up(data: Data = None, as_json: Json = False) -> None:
    """Start the embedded server, unless it runs already. It runs until `agentperf down`."""
    from agentperf_redis.cli.embedded import up as work

    do(lambda: work(data, as_json=as_json))


@app.command()
def down(data: Data = None, as_json: Json = False) -> None:
    """Stop the embedded server. Its data stays on disk."""
    from agentperf_redis.cli.embedded import down as work

    do(lambda: work(data, as_json=as_json))


@app.command()
@on_server
def status(
    target: Target,
) -> Exit | None:
    """Show all three services at a glance."""
    from agentperf_redis.cli.status import status as work

    return work(target, as_json=target.as_json)


@app.command()
@on_server
def agents(
    target: Target,
    window: Window = None,
) -> Exit | None:
    """List all agents: executions, success, durations, errors."""
    from agentperf_redis.cli.metrics import agents as work

    return work(target, window, as_json=target.as_json)


@app.command()
@on_server
def show(
    target: Target,
    agent: Agent,
    window: Window = None,
) -> Exit | None:
    """Show everything about one agent. Exit 4 if the agent has no records at all."""
    from agentperf_redis.cli.metrics import show as work

    return work(target, agent, window, as_json=target.as_json)


@app.command()
@on_server
def series(
    target: Target,
    agent: MaybeAgent = None,
    window: Annotated[str, typer.Option("--window", help="Length of time: 5m, 1h, 3d, or seconds.")] = "1h",
    step: Annotated[str, typer.Option("--step", help="Length of a step: 10s, 1m, 1h, or seconds.")] = "1m",
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="End of the window, such as 2026-11-29T16:45. Default: now.")
    ] = None,
) -> Exit | None:
    """Show an agent over time, one line a step. Percentiles are within 2.17%. Exit 4 if the agent has no records."""
    from agentperf_redis.cli.series import series as work

    return work(target, agent, window, step, as_of, as_json=target.as_json)


@app.command()
@on_server
def forget(
    target: Target,
    agents: Annotated[
        list[str], typer.Argument(help="Agents, or globs such as 'job-*'.", metavar="AGENT...", show_default=False)
    ],
    yes: Yes = False,
) -> Exit | None:
    """Delete agents: their all-time counts, raw samples and spans. Their time slices remain until they expire.

    So when such an agent records again, windows show its old slices. If a name or a glob matches no agent, the others
    are deleted, and the exit code is 4.
    """
    from agentperf_redis.cli.metrics import forget as work

    return work(target, agents, yes=yes, as_json=target.as_json)


@app.command()
@on_server
def errors(
    target: Target,
    agent: MaybeAgent = None,
    window: Window = None,
) -> Exit | None:
    """List the errors of each agent and how often they occur."""
    from agentperf_redis.cli.metrics import errors as work

    return work(target, agent, window, as_json=target.as_json)


@app.command()
@on_server
def slow(
    target: Target,
    agent: MaybeAgent = None,
    limit: Limit = 20,
) -> Exit | None:
    """List the slowest executions. The server keeps 50 per agent for 8 days. For a window, use rank --by p95."""
    from agentperf_redis.cli.metrics import slow as work

    return work(target, agent, limit, as_json=target.as_json)


@app.command()
@on_server
def rank(
    target: Target,
    by: Annotated[RankBy, typer.Option("--by", help="Figure to rank by.")] = RankBy.SCORE,
    window: Window = None,
    min_tasks: Annotated[int, typer.Option("--min-tasks", help="Leave out agents with fewer executions.", min=0)] = 1,
) -> Exit | None:
    """Rank the agents. By score, the best comes first; by any other figure, the largest value."""
    from agentperf_redis.cli.metrics import rank as work

    return work(target, by, window, min_tasks, as_json=target.as_json)


@app.command()
@on_server
def compare(
    target: Target,
    agent: Agent,
    other: Annotated[
        str | None,
        typer.Argument(help="Agent to compare it with. Without it, --window is required.", metavar="[OTHER]"),
    ] = None,
    window: Window = None,
) -> Exit | None:
    """Compare an agent with another, or with itself in the time before the window. Give OTHER, --window or both."""
    from agentperf_redis.cli.metrics import compare as work

    return work(target, agent, other, window, as_json=target.as_json)


@app.command()
@on_server
def spans(
    target: Target,
    agent: Agent,
    window: Window = None,
) -> Exit | None:
    """Show how an agent's time is spent, span by span."""
    from agentperf_redis.cli.metrics import spans as work

    return work(target, agent, window, as_json=target.as_json)


@app.command()
@on_server
def workers(
    target: Target,
) -> Exit | None:
    """List the processes that record or hold leases: state, leases, running executions, undelivered records.

    A lost worker has sent no heartbeat for 12 s: it was killed, is stopped or cannot reach the server. It disappears
    after 25 s. up: time since it first recorded or leased. pending: executions that wait since its last flush failed.
    """
    from agentperf_redis.cli.workers import workers as work

    return work(target, as_json=target.as_json)


@app.command()
@on_server
def running(
    target: Target,
    agent: MaybeAgent = None,
) -> Exit | None:
    """List the tracked executions that have begun and not ended, the oldest first: hung calls.

    Executions appear after a second, at most six seconds after they began. Exit 4 if the agent neither runs nor has
    records.
    """
    from agentperf_redis.cli.workers import running as work

    return work(target, agent, as_json=target.as_json)


@app.command()
@on_server
def doctor(
    target: Target,
) -> Exit | None:
    """Examine the server and suggest changes. Exit 1 if a finding is bad."""
    from agentperf_redis.cli.doctor import doctor as work

    return work(target, as_json=target.as_json)


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)
