"""`agentperf export ...`: documents that are written to stdout or a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Literal

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.cli.console import Exit, NotFound, Target, WrongUsage, err, out, print_json, quoted
from agentperf_redis.cli.extras import failed, needs_extra
from agentperf_redis.cli.times import parsed_window
from agentperf_redis.errors import InvalidRules
from agentperf_redis.export.prometheus_rules import rules_file
from agentperf_redis.export.records import (
    AGENT_FIELDS,
    EXECUTION_FIELDS,
    Record,
    finite,
    of_agent,
    of_execution,
    write_csv,
    write_ndjson,
)

_MAX_EXECUTIONS = 1000
"""The server holds at most this many executions of one agent."""


def grafana(output: Path | None, *, as_json: bool) -> Exit:
    """Write a dashboard. With `as_json`, print a JSON document that has the dashboard as a field."""
    with needs_extra("grafana"):
        from agentperf_redis.export.grafana import dashboard
    text = dashboard()
    if as_json:
        _refuse_output(output)
        print_json("export grafana", {"dashboard": json.loads(text)})
        return Exit.OK
    with _destination(output) as file:
        file.write(text)
    return Exit.OK


def prometheus_rules(file: Path, output: Path | None, *, as_json: bool) -> Exit:
    """Write the rules of a file as alerting rules for Prometheus. Report the rules that Prometheus cannot express."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        failed(f"cannot read {file}: {getattr(error, 'strerror', None) or error}")
    try:
        made, left_out = rules_file(read_rules(text, str(file)))
    except InvalidRules as faulty:
        for fault in faulty.faults:
            err.print(f"agentperf: {fault}", style="red")
        return Exit.USAGE
    if as_json:
        _refuse_output(output)
        omitted = [{"rule": each.rule, "reason": each.reason} for each in left_out]
        print_json("export prometheus-rules", {"yaml": made, "left_out": omitted})
        return Exit.OK
    with _destination(output) as to:
        to.write(made)
    for each in left_out:
        err.print(f"agentperf: left out {quoted(each.rule)}: {each.reason}", style="yellow")
    return Exit.OK


def records(
    target: Target,
    wanted: Literal["agents", "executions"],
    agents: list[str] | None,
    window: str | None,
    output: Path | None,
    *,
    lines: Literal["csv", "ndjson"],
) -> Exit:
    """Write one line for each agent or execution."""
    with target.connect() as perf:
        found = _agents(perf, agents, window) if wanted == "agents" else _executions(perf, agents, window)
    if target.as_json:
        _refuse_output(output)
        rows = [finite(each) for each in found]
        print_json(f"export {lines}", {"records": wanted, "window": window, "rows": rows})
        return Exit.OK
    with _destination(output) as file:
        if lines == "csv":
            write_csv(found, AGENT_FIELDS if wanted == "agents" else EXECUTION_FIELDS, file)
        else:
            write_ndjson(found, file)
    return Exit.OK


def _agents(perf: AgentPerf, names: list[str] | None, window: str | None) -> list[Record]:
    metrics = perf.metrics
    if names:
        known = metrics.snapshots(percentiles=False)
        found = [metrics.get_or_create_metrics(name, window=parsed_window(window)) for name in dict.fromkeys(names)]
        _refuse_unknown(names, known)
    else:
        found = list(metrics.snapshots(window=parsed_window(window)).values())
    return [of_agent(each) for each in found if names or each.task_count or each.llm_calls or each.tool_calls]


def _executions(perf: AgentPerf, names: list[str] | None, window: str | None) -> list[Record]:
    metrics = perf.metrics
    known = metrics.snapshots(window=parsed_window(window), percentiles=False)
    _refuse_unknown(names or [], known)
    found: list[Record] = []
    for name in dict.fromkeys(names or known):
        since = known[name].interval.start if window is not None else 0.0
        latest = metrics.recent(name, limit=_MAX_EXECUTIONS)
        found += [of_execution(name, each) for each in reversed(latest) if each.ended.timestamp() >= since]
    return found


def _refuse_output(output: Path | None) -> None:
    """Refuse --output together with --json, because --json prints to stdout."""
    if output is not None:
        raise WrongUsage("--output does not go with --json, which prints to stdout")


def _refuse_unknown(names: list[str], known: Mapping[str, object]) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise NotFound(f"{quoted(*missing)}: no records; `agentperf agents` lists all agents")


@contextlib.contextmanager
def _destination(output: Path | None) -> Iterator[IO[str]]:
    """Open the file, or use stdout if no file is given."""
    if output is None:
        yield out.file
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        failed(f"cannot write {output}: {error.strerror or error}")
