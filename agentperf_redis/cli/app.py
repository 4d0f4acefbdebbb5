"""The commands and their options. The other modules of this package implement the commands.

Exit codes: 0 ok, 1 failure, 2 usage, 3 server unreachable, 4 not found, 130 interrupted, 141 output closed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentperf_redis.cli import alerts, balancer, cache, export, pools, reshard, serve, top
from agentperf_redis.cli.console import Exit, Target, WrongUsage
from agentperf_redis.cli.options import (
    AsOf,
    Data,
    Json,
    Namespace,
    Timeout,
    Url,
    Window,
    Yes,
    do,
    do_locally,
    on_server,
    outer_option,
)
from agentperf_redis.metrics.comparison import RankBy

app = typer.Typer(
    name="agentperf",
    help="Metrics, caches and load balancing for fleets of AI agents, shared through one Redis or Valkey.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 server unreachable, 4 not found, 130 interrupted, "
    "141 output closed.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(alerts.app, name="alerts")
app.command()(alerts.check)
app.add_typer(balancer.app, name="lb")
balancer.app.command()(pools.rest)
balancer.app.command("delete-pool")(pools.delete_pool)
app.add_typer(cache.app, name="cache")
cache.app.command()(reshard.reshard)
app.add_typer(export.app, name="export")
app.command()(export.exporter)
app.command()(serve.serve)
app.command()(top.top)

Limit = Annotated[int, typer.Option("--limit", help="Maximum number of rows.", min=1, max=1000, metavar="N")]
Agent = Annotated[str, typer.Argument(help="The agent.", metavar="AGENT", show_default=False)]
MaybeAgent = Annotated[str | None, typer.Argument(help="Only this agent. Default: all.", metavar="[AGENT]")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    wants_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    url: Url = None,  # noqa: ARG001  `outer_option` reads these three
    namespace: Namespace = None,  # noqa: ARG001
    timeout: Timeout = None,  # noqa: ARG001
    as_json: Json = False,
) -> None:
    """Metrics, caches and load balancing for fleets of AI agents, shared through one Redis or Valkey."""
    if wants_version:
        from agentperf_redis.cli.version import version as work

        do(lambda: work(as_json=as_json))
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


@app.command()
def demo(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Server. Default: a private one that ends with the demo.", metavar="URL"),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--path", help="Source tree to review. Default: the standard library.", metavar="DIR")
    ] = None,
    files: Annotated[
        int | None, typer.Option("--files", help="Review at most this many files.", min=1, metavar="N")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes.", min=1, max=64, metavar="N")] = 4,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill one worker half-way through.")] = True,
    llm: Annotated[
        bool,
        typer.Option(
            "--llm",
            help="Record each step as a model call too. No model is called: tokens are counted characters of the work, "
            "4 to a token; models and prices are made up.",
        ),
    ] = False,
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

    url = outer_option(context, "url") if url is None else url
    namespace = outer_option(context, "namespace") if namespace is None else namespace
    as_json = as_json or bool(outer_option(context, "as_json"))
    do(lambda: work(url, path, files, workers, namespace, kill=kill, llm=llm, as_json=as_json))


@app.command()
def up(context: typer.Context, data: Data = None, as_json: Json = False) -> None:
    """Start the embedded server, unless it runs already. It runs until `agentperf down`."""
    from agentperf_redis.cli.embedded import up as work

    do_locally(context, lambda plain: work(data, as_json=plain), as_json=as_json)


@app.command()
def down(context: typer.Context, data: Data = None, as_json: Json = False) -> None:
    """Stop the embedded server. Its data stays on disk."""
    from agentperf_redis.cli.embedded import down as work

    do_locally(context, lambda plain: work(data, as_json=plain), as_json=as_json)


@app.command()
@on_server
def status(
    target: Target,
    window: Window = None,
    as_of: AsOf = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[
        float, typer.Option("--every", help="Pause between two readings, with --watch.", min=0.1, metavar="SECONDS")
    ] = 2.0,
) -> Exit | None:
    """Show all three services at a glance, problems first. With --window, agents and rates are those of the window.

    With --json and --watch, each reading is one line of JSON.
    """
    from agentperf_redis.cli.status import status as work

    return work(target, window, as_of, every if watch else None)


@app.command()
@on_server
def agents(
    target: Target,
    window: Window = None,
    as_of: AsOf = None,
) -> Exit | None:
    """List all agents: executions, success, durations, errors."""
    from agentperf_redis.cli.metrics import agents as work

    return work(target, window, as_of, as_json=target.as_json)


@app.command()
@on_server
def show(
    target: Target,
    agent: Agent,
    window: Window = None,
    as_of: AsOf = None,
) -> Exit | None:
    """Show everything about one agent. Exit 4 if the agent has no records at all."""
    from agentperf_redis.cli.metrics import show as work

    return work(target, agent, window, as_of, as_json=target.as_json)


@app.command()
@on_server
def series(
    target: Target,
    agent: Annotated[str | None, typer.Argument(help="The agent.", metavar="[AGENT]", show_default=False)] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Show this cache instead.", metavar="NAME")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Show this pool instead.", metavar="TYPE")] = None,
    window: Annotated[
        str, typer.Option("--window", help="Length of time: 5m, 1h, 3d, or seconds.", metavar="TIME")
    ] = "1h",
    step: Annotated[
        str, typer.Option("--step", help="Length of a step: 10s, 1m, 1h, or seconds.", metavar="TIME")
    ] = "1m",
    as_of: AsOf = None,
) -> Exit | None:
    """Show an agent, a cache or a pool over time, one line a step. Percentiles are within 2.17%. Exit 4 if unknown."""
    from agentperf_redis.cli.series import series as work

    return work(target, agent, cache, pool, window, step, as_of, as_json=target.as_json)


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
    as_of: AsOf = None,
) -> Exit | None:
    """List the errors of each agent and how often they occur."""
    from agentperf_redis.cli.metrics import errors as work

    return work(target, agent, window, as_of, as_json=target.as_json)


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
    as_of: AsOf = None,
    min_tasks: Annotated[
        int, typer.Option("--min-tasks", help="Leave out agents with fewer executions.", min=0, metavar="N")
    ] = 1,
) -> Exit | None:
    """Rank the agents. By score, the best comes first; by any other figure, the largest value."""
    from agentperf_redis.cli.metrics import rank as work

    return work(target, by, window, as_of, min_tasks, as_json=target.as_json)


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
    as_of: AsOf = None,
    other_window: Annotated[
        str | None,
        typer.Option("--other-window", help="Window of the other side. Default: --window.", metavar="TIME"),
    ] = None,
    other_as_of: Annotated[
        str | None,
        typer.Option(
            "--other-as-of",
            help="End of the other side's window. Default: --as-of, or the start of the window without OTHER.",
            metavar="TIME",
        ),
    ] = None,
) -> Exit | None:
    """Compare an agent with another, or with itself in the time before the window. Give OTHER, --window or both."""
    from agentperf_redis.cli.metrics import OtherSide
    from agentperf_redis.cli.metrics import compare as work

    return work(target, agent, window, as_of, OtherSide(other, other_window, other_as_of), as_json=target.as_json)


@app.command()
@on_server
def spans(
    target: Target,
    agent: Agent,
    window: Window = None,
    as_of: AsOf = None,
) -> Exit | None:
    """Show how an agent's time is spent, span by span."""
    from agentperf_redis.cli.metrics import spans as work

    return work(target, agent, window, as_of, as_json=target.as_json)


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
    acl: Annotated[
        bool, typer.Option("--acl", help="Print the command that makes an ACL user for the namespace instead.")
    ] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="With --acl: a user for serve and top, without the rights to write.")
    ] = False,
    user: Annotated[
        str | None,
        typer.Option("--user", help="With --acl: name of the user. Default: worker, or dashboard.", metavar="NAME"),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            help="Instead, print what a planned load needs: agents=1000,rps=50,entries=1e6,value=500,instances=5000,"
            "acquires=2000.",
            metavar="KEY=NUMBER,...",
        ),
    ] = None,
) -> Exit | None:
    """Examine the server and suggest changes. Exit 1 if a finding is bad.

    With --acl, print an ACL SETUSER command for redis-cli, with the rights that the library needs. It changes nothing.

    With --plan, print the memory, server time, network, nodes and shards that a load needs, from costs measured on the
    server within some 3 s, on keys that are deleted afterwards. Keys of a plan: agents, and rps, their executions a
    second in all; entries of a cache, with values of value bytes (500), reads a second (as rps), of which the share
    hits (0.8) finds a value, and each other one leads to a put; instances of a pool, acquires a second, each lease
    held for held seconds (1); processes (16); memory of a node in bytes (maxmemory of the server, else 8 GiB).
    """
    if acl and plan is not None:
        raise WrongUsage("--plan does not go with --acl")
    if acl:
        from agentperf_redis.cli.acl import acl as print_user

        return print_user(target, user, read_only=read_only)
    if read_only or user is not None:
        raise WrongUsage("--read-only and --user go with --acl")
    if plan is not None:
        from agentperf_redis.cli.doctor_plan import doctor_plan

        return doctor_plan(target, plan, as_json=target.as_json)
    from agentperf_redis.cli.doctor import doctor as work

    return work(target, as_json=target.as_json)


@app.command()
@on_server
def inspect(
    target: Target,
    key: Annotated[str, typer.Argument(help="Whole name of a key, as SCAN shows it.", metavar="KEY")],
    limit: Annotated[int, typer.Option("--limit", help="Maximum number of fields.", min=1, max=1000, metavar="N")] = 50,
) -> Exit | None:
    """Show any key of the library in words: what it holds, its fields explained, its TTL. Exit 4 without such a key."""
    from agentperf_redis.cli.inspect import inspect as work

    return work(target, key, limit)


@app.command()
def version(context: typer.Context, as_json: Json = False) -> None:
    """Print the version."""
    from agentperf_redis.cli.version import version as work

    do_locally(context, lambda plain: work(as_json=plain), as_json=as_json)
