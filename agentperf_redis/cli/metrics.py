"""The commands about metrics: `agentperf agents`, `show`, `forget`, `errors`, `slow`, `rank`, `compare`, `spans`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from agentperf_redis.cli.agents import agents_table, by_tasks, plain_agent, plain_time
from agentperf_redis.cli.console import (
    Exit,
    Target,
    WrongUsage,
    confirmed,
    counted,
    duration,
    err,
    new_table,
    not_found,
    out,
    print_json,
    printable,
    quoted,
    seconds_cell,
)
from agentperf_redis.cli.models import models_table, plain_model
from agentperf_redis.cli.times import asked_end, parsed_window, window_text
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.comparison import Change, RankBy
from agentperf_redis.metrics.model import OTHER, Execution, Interval, PerformanceMetrics

_NOTHING = "Nothing was recorded."
_MISSING = "–"
_SHOWN_NAMES = 10
"""Maximum number of names that the question before a deletion shows."""


def agents(target: Target, window: str | None, as_of: str | None, *, as_json: bool) -> Exit:
    """Print one line per agent."""
    with target.connect() as perf:
        found = _active(perf.metrics.snapshots(window=parsed_window(window), as_of=asked_end(as_of, window)).values())
    if as_json:
        print_json("agents", {"window": window, "as_of": as_of, "agents": [plain_agent(each) for each in found]})
    elif found:
        out.print(agents_table(by_tasks(found), rates=window is not None, past=as_of is not None))
    else:
        target.nothing(_NOTHING)
    return Exit.OK


def show(target: Target, agent: str, window: str | None, as_of: str | None, *, as_json: bool) -> Exit:
    """Print everything about one agent."""
    with target.connect() as perf:
        end = asked_end(as_of, window)
        found = perf.metrics.get_or_create_metrics(agent, window=parsed_window(window), as_of=end)
        if not _is_known(perf.metrics, agent):
            return _unknown(agent)
        streams = perf.metrics.streams(agent, window=parsed_window(window), as_of=end)
        latest = perf.metrics.recent(agent, limit=5)
    if as_json:
        data = plain_agent(found) | _more_of_agent(found) | {"window": window, "as_of": as_of}
        data["streams"] = {
            "count": streams.first.task_count,
            "items": streams.items,
            "first_item_p95_s": streams.first.p95_execution_time,
            "between_items_p95_s": streams.between.p95_execution_time,
        }
        print_json("show", data | {"latest": [_plain_execution(agent, each) for each in latest]})
        return Exit.OK
    about = "" if found.exact else "≈"
    out.print(f"{agent}, {window_text(window, as_of)}: {counted(found.task_count, 'execution')}")
    if found.task_count:
        out.print(
            f"outcome    {found.success_count} succeeded ({found.success_rate:.1%}), {found.failure_count} failed, "
            f"{found.cancelled_count} cancelled; {found.throughput:.3g} per second"
        )
        out.print(
            f"duration   average {duration(found.avg_execution_time)}, from {duration(found.min_execution_time)} "
            f"to {duration(found.max_execution_time)}, {duration(found.total_execution_time)} in all"
        )
        out.print(
            f"quantiles  p50 {about}{duration(found.p50_execution_time)}, "
            f"p95 {about}{duration(found.p95_execution_time)}, p99 {about}{duration(found.p99_execution_time)}; "
            + ("exact" if found.exact else f"within {found.error_bound:.2%}")
        )
    if streams.first.task_count:
        out.print(
            f"streams    {streams.first.task_count} with {counted(streams.items, 'item')}; "
            f"first item p95 {duration(streams.first.p95_execution_time)}, "
            f"between items p95 {duration(streams.between.p95_execution_time)}"
        )
    if found.llm_calls or found.tool_calls:
        out.print(
            f"calls      {found.llm_calls} to models, {found.tool_calls} to tools; "
            f"{found.tokens_in} tokens in, {found.tokens_out} out, cost {found.cost:.6g}"
        )
    if found.tokens_cached_in or found.tokens_cache_write or found.tokens_reasoning:
        out.print(
            f"of these   {found.tokens_cached_in} tokens in read from the provider's cache, {found.tokens_cache_write} "
            f"written to it; {found.tokens_reasoning} out of reasoning"
        )
    for table in (_errors_table([found]), models_table(found.models), _executions_table("latest", [(agent, latest)])):
        if table.row_count:
            out.print()
            out.print(table)
    return Exit.OK


def forget(target: Target, patterns: list[str], *, yes: bool, as_json: bool) -> Exit:
    """Ask for confirmation, then delete the agents that have these names or match these globs."""
    with target.connect() as perf:
        known = perf.backend.run(flows.agent_names(perf.metrics._flusher))  # noqa: SLF001  reads only the names
        found, missing = [], []
        for pattern in patterns:
            matching = [pattern]
            if pattern not in known:
                # No glob selects `__other__`: it stands for all agents beyond the maximum number of agents.
                matching = [name for name in known if fnmatch.fnmatchcase(name, pattern) and name != OTHER]
            found += matching
            missing += [] if matching else [pattern]
        chosen = sorted(set(found))
        if not chosen:
            return _unknown(*missing)
        shown = ", ".join(map(printable, chosen[:_SHOWN_NAMES])) + (", ..." if len(chosen) > _SHOWN_NAMES else "")
        refused = confirmed(f"Delete the metrics of {counted(len(chosen), 'agent')} ({shown})?", yes=yes)
        if refused is not None:
            return refused
        forgotten = [name for name in chosen if perf.metrics.forget(name)]
    if as_json:
        print_json("forget", {"asked": patterns, "agents": forgotten, "missing": missing})
    else:
        out.print(f"Forgot {counted(len(forgotten), 'agent')}.")
    return _unknown(*missing) if missing else Exit.OK


def errors(target: Target, agent: str | None, window: str | None, as_of: str | None, *, as_json: bool) -> Exit:
    """Print one line per agent and error type, the most frequent first."""
    with target.connect() as perf:
        if agent is None:
            found = list(perf.metrics.snapshots(window=parsed_window(window), as_of=asked_end(as_of, window)).values())
        else:
            found = [
                perf.metrics.get_or_create_metrics(agent, window=parsed_window(window), as_of=asked_end(as_of, window))
            ]
            if not _is_known(perf.metrics, agent):
                return _unknown(agent)
    if as_json:
        rows = [
            {"agent": each.agent_name, "error": error, "count": count, "share": count / each.task_count}
            for each, error, count in _by_frequency(found)
        ]
        print_json("errors", {"window": window, "as_of": as_of, "errors": rows})
        return Exit.OK
    table = _errors_table(found)
    if table.row_count:
        out.print(table)
    else:
        target.nothing("Nothing failed." if any(each.task_count for each in found) else _NOTHING)
    return Exit.OK


def slow(target: Target, agent: str | None, limit: int, *, as_json: bool) -> Exit:
    """Print the slowest executions."""
    with target.connect() as perf:
        if agent is not None and not _is_known(perf.metrics, agent):
            return _unknown(agent)
        names = [agent] if agent is not None else sorted(perf.metrics.snapshots(percentiles=False))
        found = [(name, each) for name in names for each in perf.metrics.slowest(name, limit=limit)]
    found = sorted(found, key=lambda pair: -pair[1].seconds)[:limit]
    if as_json:
        print_json("slow", {"executions": [_plain_execution(name, each) for name, each in found]})
    elif found:
        out.print(_executions_table("slowest", [(name, (each,)) for name, each in found]))
    else:
        target.nothing(_NOTHING)
    return Exit.OK


def rank(target: Target, by: RankBy, window: str | None, as_of: str | None, min_tasks: int, *, as_json: bool) -> Exit:
    """Print the agents in the requested order."""
    with target.connect() as perf:
        found = perf.metrics.rank(by, window=parsed_window(window), as_of=asked_end(as_of, window), min_tasks=min_tasks)
    if as_json:
        rows = [{"value": each.value, **plain_agent(each.metrics)} for each in found]
        print_json("rank", {"by": by.value, "window": window, "as_of": as_of, "agents": rows})
        return Exit.OK
    if not found:
        target.nothing(_NOTHING)
        return Exit.OK
    table = new_table(
        f"agents by {by.value}, {window_text(window, as_of)}", ["", "agent"], [by.value, "tasks", "success", "avg s"]
    )
    for position, each in enumerate(found, start=1):
        about = "≈" if by is RankBy.P95 and not each.metrics.exact else ""
        table.add_row(
            str(position),
            each.metrics.agent_name,
            f"{each.value:.1%}" if by is RankBy.ERROR_RATE else f"{about}{_number(each.value)}",
            str(each.metrics.task_count),
            f"{each.metrics.success_rate:.1%}",
            seconds_cell(each.metrics.avg_execution_time),
        )
    out.print(table)
    return Exit.OK


@dataclass(frozen=True, slots=True)
class OtherSide:
    """The other side of a comparison: an agent, a window and the end of the window, each None if it was not given."""

    agent: str | None
    window: str | None
    as_of: str | None


def compare(
    target: Target, agent: str, window: str | None, as_of: str | None, side: OtherSide, *, as_json: bool
) -> Exit:
    """Print two agents, or one agent in two time ranges, figure by figure."""
    other = side.agent
    if other is None and window is None:
        raise WrongUsage("give OTHER, or --window to compare with the time before it")
    with target.connect() as perf:
        found = perf.metrics.compare(
            agent,
            other,
            window=parsed_window(window),
            as_of=asked_end(as_of, window),
            other_window=parsed_window(side.window),
            other_as_of=asked_end(side.as_of, side.window or window, "--other-as-of"),
        )
        for name in dict.fromkeys((agent, other or agent)):
            if not _is_known(perf.metrics, name):
                return _unknown(name)
    first = "before" if other is None else other
    if as_json:
        changes = {
            each.name: {
                "first": _finite(each.first),
                "second": _finite(each.second),
                "ratio": None if each.ratio is None else _finite(each.ratio),
                "certain": each.certain,
            }
            for each in found.changes
        }
        sides = {
            side: {"agent": each.agent_name, "interval": _plain_interval(each.interval)}
            for side, each in (("first", found.first), ("second", found.second))
        }
        print_json("compare", {"window": window, "as_of": as_of, **sides, "changes": changes})
        return Exit.OK
    table = new_table(f"{first} → {agent}, {window_text(window, as_of)}", ["figure"], [first, agent, "change"])
    ran = (found.first.task_count > 0, found.second.task_count > 0)
    for each in found.changes:
        if not any(map(_finite, (each.first, each.second))):
            continue  # each figure is zero or not finite: `_finite` returned 0 or None
        values = zip(ran, (each.first, each.second), strict=True)
        cells = [_number(value) if known else _MISSING for known, value in values]
        table.add_row(each.name, *cells, _change_text(each) if all(ran) else _MISSING)
    if not table.row_count:
        err.print(f"Nothing was recorded for either side in {window_text(window, as_of)}.")
        return Exit.OK
    out.print(table)
    if not ran[0]:
        when = f"the time before {window_text(window, as_of)}" if other is None else window_text(window, as_of)
        err.print(f"{other or agent} had no executions in {when}.")
    elif not ran[1]:
        err.print(f"{agent} had no executions in {window_text(window, as_of)}.")
    return Exit.OK


def _change_text(change: Change) -> str:
    """Say how a figure differs between the two sides of a comparison. Both sides must have executions."""
    if change.first == change.second:
        return "equal"
    if not change.certain:
        return "not significant"
    ratio = None if change.ratio is None else _finite(change.ratio)
    return f"{ratio - 1:+.1%}" if ratio is not None else _MISSING


def spans(target: Target, agent: str, window: str | None, as_of: str | None, *, as_json: bool) -> Exit:
    """Print the spans of an agent as a tree, and the span that takes most of the time."""
    with target.connect() as perf:
        report = perf.metrics.spans(agent, window=parsed_window(window), as_of=asked_end(as_of, window))
        if not _is_known(perf.metrics, agent):
            return _unknown(agent)
    bottleneck = report.bottleneck
    if as_json:
        rows = [
            {
                "path": list(each.path),
                "self_s": each.self_time,
                "share": each.share,
                "count": each.metrics.task_count,
                "failures": each.metrics.failure_count,
                "avg_s": each.metrics.avg_execution_time,
                "p95_s": each.metrics.p95_execution_time,
                "percentiles_exact": each.metrics.exact,
            }
            for each in report.tree
        ]
        where = None if bottleneck is None else list(bottleneck.path)
        print_json(
            "spans",
            {
                "agent": agent,
                "window": window,
                "as_of": as_of,
                "total_s": report.total,
                "bottleneck": where,
                "spans": rows,
            },
        )
        return Exit.OK
    if bottleneck is None:
        err.print(f"Nothing was recorded for {agent} in {window_text(window, as_of)}.")
        return Exit.OK
    table = new_table(
        f"time of {agent} by span, {window_text(window, as_of)}",
        ["span"],
        ["self s", "share", "count", "failed", "avg s", "p95 s"],
    )
    for each in report.tree:
        about = "" if each.metrics.exact else "≈"
        table.add_row(
            "  " * len(each.path) + (each.path[-1] if each.path else agent),
            seconds_cell(each.self_time),
            f"{each.share:.1%}",
            str(each.metrics.task_count),
            str(each.metrics.failure_count),
            seconds_cell(each.metrics.avg_execution_time),
            f"{about}{seconds_cell(each.metrics.p95_execution_time)}",
        )
    out.print(table)
    out.print()
    out.print(
        f"Most of the time, {bottleneck.share:.1%} of {duration(report.total)}, is spent in "
        f"{bottleneck.name or 'the work of ' + agent + ' itself'}."
    )
    return Exit.OK


def _is_known(metrics: MetricsCollector, agent: str) -> bool:
    """Return whether an agent has any records. Call this last: the error for a bad window must come first."""
    found = metrics.get_or_create_metrics(agent)
    return bool(found.task_count or found.llm_calls or found.tool_calls or metrics.spans(agent).spans)


def _unknown(*names: str) -> Exit:
    what = "agent" if len(names) == 1 else "agents"
    return not_found(f"{what} {quoted(*names)}: no records; `agentperf agents` lists all agents")


def _active(found: Iterable[PerformanceMetrics]) -> list[PerformanceMetrics]:
    return [each for each in found if each.task_count or each.llm_calls or each.tool_calls]


def _by_frequency(found: Iterable[PerformanceMetrics]) -> list[tuple[PerformanceMetrics, str, int]]:
    """Return agent, error type and count; failures recorded without a type have the type ``""``."""
    rows = [(each, error, count) for each in found for error, count in each.error_types.items()]
    for each in found:
        untyped = each.failure_count - sum(each.error_types.values())
        if untyped > 0:
            rows.append((each, "", untyped))
    return sorted(rows, key=lambda row: (-row[2], row[0].agent_name, row[1]))


def _errors_table(found: Iterable[PerformanceMetrics]) -> Table:
    table = new_table("errors", ["agent", "error"], ["count", "of all executions"])
    for each, error, count in _by_frequency(found):
        table.add_row(each.agent_name, error or "(no type)", str(count), f"{count / each.task_count:.1%}")
    return table


def _executions_table(title: str, found: Iterable[tuple[str, Iterable[Execution]]]) -> Table:
    table = new_table(title, ["ended", "agent", "outcome"], ["s"])
    for agent, executions in found:
        for each in executions:
            table.add_row(f"{each.ended:%Y-%m-%d %H:%M:%S}", agent, _outcome(each), seconds_cell(each.seconds))
    return table


def _outcome(execution: Execution) -> str:
    if execution.success:
        return "ok"
    return "cancelled" if execution.cancelled else execution.error_type or "failed"


def _plain_execution(agent: str, execution: Execution) -> dict[str, Any]:
    return {
        "agent": agent,
        "ended": plain_time(execution.ended),
        "seconds": execution.seconds,
        "success": execution.success,
        "cancelled": execution.cancelled,
        "error": execution.error_type,
    }


def _plain_interval(interval: Interval) -> dict[str, float]:
    return {"start": interval.start, "end": interval.end}


def _more_of_agent(found: PerformanceMetrics) -> dict[str, Any]:
    return {
        "successes": found.success_count,
        "failures": found.failure_count,
        "cancelled": found.cancelled_count,
        "min_s": _finite(found.min_execution_time),
        "max_s": found.max_execution_time,
        "total_s": found.total_execution_time,
        "error_bound": found.error_bound,
        "tokens_in": found.tokens_in,
        "tokens_out": found.tokens_out,
        "tokens_cached_in": found.tokens_cached_in,
        "tokens_cache_write": found.tokens_cache_write,
        "tokens_reasoning": found.tokens_reasoning,
        "cost": found.cost,
        "llm_calls": found.llm_calls,
        "tool_calls": found.tool_calls,
        "models": {model: plain_model(use) for model, use in found.models.items()},
        "interval": _plain_interval(found.interval),
    }


def _finite(value: float) -> float | None:
    """Return a value, or None if it is infinite or NaN, which JSON cannot represent.

    The minimum duration, for example, is infinite without executions.
    """
    return value if value - value == 0 else None


def _number(value: float) -> str:
    if _finite(value) is None:
        return _MISSING
    # Below 1e15, a double represents whole numbers exactly.
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"  # noqa: PLR2004
