"""`agentperf workers` and `agentperf running`: the processes of a namespace, and the executions that run in them."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from agentperf_redis.cli.agents import plain_time
from agentperf_redis.cli.console import (
    Exit,
    Target,
    counted,
    err,
    new_table,
    not_found,
    out,
    print_json,
    printable,
    quoted,
)
from agentperf_redis.metrics.workers import RunningExecution, WorkerInfo

_OK, _LOST, _FAILING = "ok", "lost", "flush fails"
_UNITS = (("d", 86_400), ("h", 3600), ("m", 60))


def workers(target: Target, *, as_json: bool) -> Exit:
    """Print one line per worker: lost workers first, then those that cannot deliver their records."""
    with target.connect() as perf:
        found = sorted(perf.metrics.workers(), key=_urgency)
    if as_json:
        print_json("workers", {"workers": [_plain_worker(each) for each in found]})
    elif found:
        out.print(_workers_table(found))
        for each in found:
            if each.error:
                out.print(f"{_name(each)}: the last flush failed: {printable(each.error)}")
    else:
        target.nothing("No process records or holds leases now.")
    return Exit.OK


def running(target: Target, agent: str | None, *, as_json: bool) -> Exit:
    """Print the running executions, the oldest first."""
    with target.connect() as perf:
        infos = perf.metrics.workers()
        every = sorted((each for info in infos for each in info.running), key=lambda each: each.started)
        found = [each for each in every if agent in (None, each.agent)]
        if agent is not None and not found and not perf.metrics.get_or_create_metrics(agent).task_count:
            return not_found(
                f"agent {quoted(agent)}: nothing runs, and no records; `agentperf agents` lists all agents"
            )
    more = sum(info.running_more for info in infos)
    if as_json:
        print_json("running", {"agent": agent, "executions": [_plain_execution(each) for each in found], "more": more})
        return Exit.OK
    if found:
        out.print(_executions_table(found))
    else:
        err.print("Nothing has been running for a second." if agent is None else f"Nothing of {agent} is running.")
    if more:
        err.print(f"Each worker lists its oldest executions; {counted(more, 'further one')} may be of any agent.")
    return Exit.OK


def _state(info: WorkerInfo) -> str:
    if not info.alive:
        return _LOST
    return _FAILING if info.error else _OK


def _urgency(info: WorkerInfo) -> tuple[Any, ...]:
    return (_state(info) != _LOST, _state(info) == _OK, not info.dropped, info.host, info.pid, info.since)


def _name(process: WorkerInfo | RunningExecution) -> str:
    return printable(f"{process.host}:{process.pid}")


def _workers_table(found: list[WorkerInfo]) -> Table:
    table = new_table("workers", ["worker", "state"], ["up", "seen s", "leases", "running", "pending", "dropped"])
    for each in found:
        table.add_row(
            _name(each),
            _coloured(_state(each)),
            _span((each.last_seen - each.since).total_seconds() + each.heartbeat_age),
            f"{each.heartbeat_age:.0f}",
            str(each.leases_held),
            str(len(each.running) + each.running_more),
            str(each.pending),
            str(each.dropped),
        )
    return table


def _executions_table(found: list[RunningExecution]) -> Table:
    table = new_table("running", ["agent", "worker", "state"], ["age s"])
    for each in found:
        table.add_row(printable(each.agent), _name(each), _coloured(_OK if each.alive else _LOST), f"{each.age:.1f}")
    return table


def _coloured(state: str) -> Text:
    return Text(state, style={_LOST: "red", _FAILING: "yellow"}.get(state, ""))


def _span(seconds: float) -> str:
    """Return a time in its largest unit: ``3d``, ``5h``, ``12m``, ``40s``."""
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def _plain_worker(info: WorkerInfo) -> dict[str, Any]:
    return {
        "host": info.host,
        "pid": info.pid,
        "state": _state(info),
        "since": plain_time(info.since),
        "last_seen": plain_time(info.last_seen),
        "heartbeat_age_s": info.heartbeat_age,
        "alive": info.alive,
        "leases_held": info.leases_held,
        "pending": info.pending,
        "dropped": info.dropped,
        "error": info.error,
        "running": [_plain_execution(each) for each in info.running],
        "running_more": info.running_more,
        "python": info.python,
        "library": info.version,
    }


def _plain_execution(execution: RunningExecution) -> dict[str, Any]:
    return {
        "agent": execution.agent,
        "host": execution.host,
        "pid": execution.pid,
        "started": plain_time(execution.started),
        "age_s": execution.age,
        "alive": execution.alive,
    }
