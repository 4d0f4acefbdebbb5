"""The commands `agentperf exporter` and `agentperf export ...`, with their options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from agentperf_redis.cli.console import Exit, Target
from agentperf_redis.cli.options import Json, Window, do_locally, group, on_server

app = group("Write a dashboard for Grafana, rules for Prometheus, or records as CSV or NDJSON.")

Output = Annotated[
    Path | None,
    typer.Option("--output", help="Write to this file. Default: stdout.", metavar="FILE", dir_okay=False),
]
Agents = Annotated[list[str] | None, typer.Argument(help="Only these agents. Default: all.", metavar="[AGENT]...")]


class Records(Enum):
    """The records that can be exported."""

    AGENTS = "agents"
    EXECUTIONS = "executions"


Wanted = Annotated[Records, typer.Argument(help="Totals by agent, or the executions that the server still holds.")]


@on_server
def exporter(
    target: Target,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            help="Port of /metrics; 0: a free one. Default: 9464, none with --otlp.",
            min=0,
            max=65535,
            metavar="PORT",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen on. Others than loopback are open to the network.", metavar="HOST"
        ),
    ] = "127.0.0.1",
    otlp: Annotated[
        str | None, typer.Option("--otlp", help="Send to this OpenTelemetry collector, over HTTP.", metavar="URL")
    ] = None,
    every: Annotated[str, typer.Option("--every", help="Interval of --otlp: 1s to 1h.", metavar="TIME")] = "15s",
) -> Exit | None:
    """Export all metrics of the namespace: /metrics for Prometheus, or OTLP. Runs until SIGTERM or Ctrl-C.

    One exporter per namespace suffices. The counts are on the server, so a restart loses none. While the server is
    unreachable, /metrics has agentperf_up 0 and no other metrics of the namespace.
    """
    from agentperf_redis.cli.exporter import exporter as work

    return work(target, host, port, otlp, every, as_json=target.as_json)


@app.command()
def grafana(context: typer.Context, output: Output = None, as_json: Json = False) -> None:
    """Write a Grafana dashboard (JSON) over the metrics of `agentperf exporter`. Needs no server."""
    from agentperf_redis.cli.documents import grafana as work

    do_locally(context, lambda plain: work(output, as_json=plain), as_json=as_json)


@app.command("prometheus-rules")
def prometheus_rules(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A rules file of agentperf alerts.", metavar="FILE", show_default=False)],
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Write alerting rules for Prometheus (YAML) from a rules file. Needs no server.

    Rules that Prometheus cannot express over the exported metrics are named on stderr and left out.
    """
    from agentperf_redis.cli.documents import prometheus_rules as work

    do_locally(context, lambda plain: work(file, output, as_json=plain), as_json=as_json)


@app.command()
@on_server
def csv(target: Target, wanted: Wanted, agents: Agents = None, window: Window = None, output: Output = None) -> Exit:
    """Write records as CSV, with a header line. Executions: the last 1000 of each agent, of the last hour."""
    from agentperf_redis.cli.documents import records as work

    return work(target, wanted.value, agents, window, output, lines="csv")


@app.command()
@on_server
def ndjson(target: Target, wanted: Wanted, agents: Agents = None, window: Window = None, output: Output = None) -> Exit:
    """Write records as JSON, one object a line. Executions: the last 1000 of each agent, of the last hour."""
    from agentperf_redis.cli.documents import records as work

    return work(target, wanted.value, agents, window, output, lines="ndjson")
