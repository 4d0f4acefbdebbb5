"""`agentperf alerts ...` and `agentperf check`: deploy, test and evaluate rules, show states, silence alerts."""

from __future__ import annotations

import fnmatch
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts.expression import Condition, Scope, measure_of, parsed, value_text
from agentperf_redis.alerts.model import AlertEvent, AlertState, AlertStatus, Firing, Measured, Overview, Replay, plain
from agentperf_redis.alerts.notify import deliver_all
from agentperf_redis.alerts.values import PoolFigures, measured_agent, pool_value, totals_of
from agentperf_redis.cli.console import (
    JSON_VERSION,
    Exit,
    Target,
    WrongUsage,
    counted,
    err,
    new_table,
    out,
    print_json,
    printable,
)
from agentperf_redis.cli.options import group, on_server
from agentperf_redis.errors import AgentPerfError, InvalidArgument, InvalidRules
from agentperf_redis.metrics.model import Interval

app = group("Deploy, test and evaluate alert rules, show their states, and silence alerts.")

File = Annotated[Path, typer.Argument(help="Rules file, in TOML.", metavar="FILE", show_default=False)]
Rule = Annotated[str, typer.Argument(help="Name of a rule or an SLO, or a glob.", metavar="RULE", show_default=False)]
_LOOK_S = 1.0
_STYLES = {AlertState.FIRING: "bold red", AlertState.PENDING: "yellow", AlertState.SILENCED: "magenta"}


@app.command("list")
@on_server
def list_(target: Target) -> Exit | None:
    """Show the alerts, the rules and the receivers. Firing alerts come first; --json has those that are ok, too."""
    with target.connect() as perf:
        found = perf.alerts.list()
    if target.as_json:
        print_json("alerts list", plain(found))
        return None
    if not found.rules:
        err.print("No rule is deployed: agentperf alerts deploy FILE")
        return None
    states = Counter(each.state.value for each in found.alerts)
    shown = ", ".join(f"{states[state.value]} {state.value}" for state in AlertState if states[state.value])
    out.print(f"{counted(len(found.rules), 'rule')}, deployment {found.deployment}; alerts: {shown or 'none'}")
    unusual = [each for each in found.alerts if each.state is not AlertState.OK]
    for table in (_alerts_table(unusual), _rules_table(found), _receivers_table(found)):
        if table.row_count:
            out.print()
            out.print(table)
    return None


@app.command()
@on_server
def log(
    target: Target,
    rule: Annotated[str | None, typer.Argument(help="Only this rule, SLO or glob.", metavar="[RULE]")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Maximum number of rows.", min=1, max=5000, metavar="N")] = 100,
) -> Exit | None:
    """Show the last transitions and silences, the oldest first."""
    with target.connect() as perf:
        found = perf.alerts.log(rule, limit=limit)
    if target.as_json:
        print_json("alerts log", {"events": plain(found)})
    elif found:
        out.print(_events_table(found))
    else:
        err.print("No alert has changed its state.")
    return None


@app.command()
@on_server
def deploy(target: Target, file: File) -> Exit | None:
    """Check a rules file as a whole, and replace all rules by it in one step. Exit 2 if it has a fault."""
    try:
        with target.connect() as perf:
            done = perf.alerts.deploy(file)
    except InvalidRules as error:
        return _refused(error)
    if target.as_json:
        print_json("alerts deploy", plain(done))
    else:
        removed = f", {counted(done.removed, 'rule')} removed" if done.removed else ""
        out.print(f"Deployed {counted(len(done.rules), 'rule')} as deployment {done.number}{removed}.")
    return None


@app.command("test")
@on_server
def replay(
    target: Target,
    file: File,
    since: Annotated[str, typer.Option("--since", help="Replay this last time.", metavar="TIME")] = "24h",
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="End of the replay, ISO 8601. Default: now.", metavar="TIME")
    ] = None,
) -> Exit | None:
    """Replay the rules of a file over the past: when each would have fired, and for how long. Nothing is deployed."""
    try:
        with target.connect() as perf:
            found = perf.alerts.test(file, since=since, as_of=None if as_of is None else _timestamp(as_of))
    except InvalidRules as error:
        return _refused(error)
    if target.as_json:
        print_json("alerts test", plain(found))
        return None
    _print_replay(found)
    return None


@app.command()
@on_server
def silence(
    target: Target,
    rule: Rule,
    length: Annotated[str, typer.Option("--for", help="Length: 30m, 2h, 1d, or seconds.", metavar="TIME")],
) -> Exit | None:
    """Send no notifications of a rule for a time. It is evaluated nevertheless."""
    with target.connect() as perf:
        until = perf.alerts.silence(rule, _seconds(length))
    if target.as_json:
        print_json("alerts silence", {"rule": rule, "until": until})
    else:
        out.print(f"Silenced until {_time(until)}.")
    return None


@app.command()
@on_server
def unsilence(target: Target, rule: Rule) -> Exit | None:
    """End the silence of a rule."""
    with target.connect() as perf:
        perf.alerts.unsilence(rule)
    if target.as_json:
        print_json("alerts unsilence", {"rule": rule})
    else:
        out.print("The silence has ended.")
    return None


@app.command()
@on_server
def run(
    target: Target,
    once: Annotated[
        bool, typer.Option("--once", help="Evaluate the due rules, deliver the due notifications, then end.")
    ] = False,
) -> Exit | None:
    """Evaluate rules and deliver notifications until interrupted. Any number of processes may run this.

    Prints each transition. With --json, each is one line of JSON.
    """
    with target.connect() as perf:
        if once:
            events = perf.alerts.evaluate().events
            sent = deliver_all(perf.alerts._service, target.timeout + 60.0)  # noqa: SLF001  `evaluate` does not deliver
            if target.as_json:
                print_json("alerts run", {"events": plain(events), "notifications": sent})
            else:
                _print_events(events, as_json=False)
                out.print(f"{counted(len(events), 'transition')}, {counted(sent, 'notification')} sent or tried.")
            return None
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(Exit.OK))  # the `with` block lets running deliveries finish
        known = {event.id for event in perf.alerts.log(limit=1000)}
        with perf.alerts.run():
            err.print("Alerts are being evaluated. Ctrl-C ends this.")
            while True:
                time.sleep(_LOOK_S)
                known = _print_new(perf, known, as_json=target.as_json)


def _print_new(perf: AgentPerf, known: set[str], *, as_json: bool) -> set[str]:
    """Print the events whose ids are not in `known`. Return the latest 1000 ids; if the read fails, `known`."""
    try:
        events = perf.alerts.log(limit=1000)
    except AgentPerfError:  # the evaluator reports it
        return known
    _print_events([event for event in events if event.id not in known], as_json=as_json)
    return {event.id for event in events}


def _print_events(events: Iterable[AlertEvent], *, as_json: bool) -> None:
    for event in events:
        if as_json:
            document = {"kind": "alerts event", "version": JSON_VERSION, **plain(event)}
            out.file.write(json.dumps(document, ensure_ascii=False) + "\n")
        else:
            about = f"{event.rule}{', ' if event.target else ''}{event.target}"
            out.print(f"{_time(event.at)}  {event.after.value:<8}  {printable(about)}: {printable(event.reason)}")
    out.file.flush()


def _refused(error: InvalidRules) -> Exit:
    for fault in error.faults:
        err.print(f"agentperf: {printable(str(fault))}", style="red")
    err.print(f"agentperf: {counted(len(error.faults), 'fault')}; nothing was deployed", style="red")
    return Exit.USAGE


def _seconds(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _timestamp(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise WrongUsage(f"--as-of is {text!r}; allowed: a time such as 2026-11-29T16:45") from None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _length(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return " ".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def _value(value: float | None, when: str, scope: str) -> str:
    if value is None:
        return "–"
    try:
        condition = parsed("when", when, Scope(scope))
    except InvalidArgument:  # `when` is the burn rate of an objective, not a condition
        return f"{value:.3g}"
    return value_text(condition.measure, value, is_relative=condition.is_relative)


def _alerts_table(alerts: Iterable[AlertStatus]) -> Table:
    table = new_table("alerts", ["state", "rule", "target", "severity", "since (UTC)", "when"], ["value"])
    for each in alerts:
        table.add_row(
            each.state.value,
            printable(each.rule),
            printable(each.target),
            printable(each.severity),
            _time(each.since),
            each.when,
            _value(None if each.state is AlertState.NO_DATA else each.value, each.when, each.scope),
            style=_STYLES.get(each.state),
        )
    return table


def _rules_table(found: Overview) -> Table:
    table = new_table(
        "rules", ["rule", "severity", "watches", "when", "window", "last judged (UTC)", "silenced until"], []
    )
    for each in found.rules:
        table.add_row(
            printable(each.name),
            printable(each.severity),
            f"{each.scope} {printable(each.pattern)}",
            each.when,
            "" if each.scope == "pool" else _length(each.window),
            "never" if each.judged_at is None else _time(each.judged_at),
            "" if each.silenced_until is None else _time(each.silenced_until),
        )
    return table


def _receivers_table(found: Overview) -> Table:
    table = new_table("receivers", ["receiver", "address", "last error"], ["waiting", "failed", "dropped"])
    for each in found.receivers:
        table.add_row(
            printable(each.name),
            printable(each.address),
            printable(each.error or ""),
            str(each.waiting),
            str(each.attempts),
            str(each.dropped),
        )
    return table


def _events_table(events: Iterable[AlertEvent]) -> Table:
    table = new_table("transitions", ["time (UTC)", "rule", "target", "from", "to", "reason"], [])
    for each in events:
        table.add_row(
            _time(each.at),
            printable(each.rule),
            printable(each.target),
            each.before.value,
            each.after.value,
            printable(each.reason),
            style=_STYLES.get(each.after),
        )
    return table


def _print_replay(found: Replay) -> None:
    for sentence in found.coarse:
        err.print(printable(sentence))
    span = f"{_time(found.interval.start)} to {_time(found.interval.end)} UTC"
    if not found.firings:
        out.print(f"No rule would have fired from {span}: {found.judged} evaluations.")
        return
    table = new_table(
        f"{counted(len(found.firings), 'firing')} from {span}",
        ["fired (UTC)", "rule", "target", "severity"],
        ["lasted", "value"],
    )
    for each in found.firings:
        table.add_row(
            _time(each.start),
            printable(each.rule),
            printable(each.target),
            printable(each.severity),
            _lasted(each, found),
            "–" if each.value is None else f"{each.value:.4g}",
        )
    out.print(table)


def _lasted(firing: Firing, found: Replay) -> str:
    if firing.end is None:
        return f"> {_length(found.interval.end - firing.start)}"
    return _length(firing.end - firing.start)


class Nagios(IntEnum):
    """Exit codes of a check. Monitoring plugins for Nagios, Icinga and others use the same codes."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_SCOPES = {"--agent": Scope.AGENTS, "--cache": Scope.CACHE, "--pool": Scope.POOL}


@on_server
def check(
    target: Target,
    when: Annotated[str, typer.Option("--when", help="Critical condition, such as 'p95 > 2s'.", metavar="CONDITION")],
    agent: Annotated[str | None, typer.Option("--agent", help="Agent, or a glob.", metavar="NAME")] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Cache, or a glob.", metavar="NAME")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Pool, or a glob.", metavar="NAME")] = None,
    warn: Annotated[str | None, typer.Option("--warn", help="Condition of a warning.", metavar="CONDITION")] = None,
    window: Annotated[
        str, typer.Option("--window", help="The last 30s, 5m, 1h, 3d of an agent.", metavar="TIME")
    ] = "5m",
    min_events: Annotated[
        int, typer.Option("--min-events", help="With fewer executions: unknown.", min=0, metavar="N")
    ] = 1,
) -> Exit | None:
    """Judge a condition once, for pipelines and monitoring. Exit 0 ok, 1 warning, 2 critical, 3 unknown, as in Nagios.

    The figures of a cache are those of all time.
    """
    names = {"--agent": agent, "--cache": cache, "--pool": pool}
    # The number is an exit code of Nagios, so its name in `Exit` does not fit: here, 2 means critical, not USAGE.
    return Exit(_checked(target, names, when, warn, window, min_events))


def _checked(
    target: Target, names: Mapping[str, str | None], when: str, warn: str | None, window: str, min_events: int
) -> int:
    """Judge a condition, and return an exit code of Nagios."""
    given = [(option, name) for option, name in names.items() if name is not None]
    if len(given) != 1:
        return _print_check(target, Nagios.UNKNOWN, "give one of --agent, --cache and --pool", [])
    option, pattern = given[0]
    scope = _SCOPES[option]
    try:
        critical = parsed("--when", when, scope)
        warning = parsed("--warn", warn, scope) if warn is not None else None
        if warning is not None and warning.measure != critical.measure:
            raise InvalidArgument("--warn", warn, f"a condition on {critical.measure}, as in --when")
        arguments.name(option, pattern)
        with target.connect() as perf:
            found = _measured(perf, scope, pattern, critical, window)
    except AgentPerfError as error:
        return _print_check(target, Nagios.UNKNOWN, str(error), [])
    results = []
    for name, measured in sorted(found.items()):
        if measured is None or 0 <= measured.events < min_events:
            events = "no data" if measured is None else counted(measured.events, "execution")
            results.append((Nagios.UNKNOWN, name, f"{name}: {events}", measured))
            continue
        value = value_text(critical.measure, measured.value, is_relative=critical.is_relative)
        level, condition = Nagios.OK, critical
        if critical.holds(measured.value):
            level = Nagios.CRITICAL
        elif warning is not None and warning.holds(measured.value):
            level, condition = Nagios.WARNING, warning
        results.append((level, name, f"{name}: {critical.measure} is {value} ({condition.text})", measured))
    if not results:
        return _print_check(target, Nagios.UNKNOWN, f"there is no {scope.value.removesuffix('s')} {pattern!r}", [])
    order = (Nagios.OK, Nagios.UNKNOWN, Nagios.WARNING, Nagios.CRITICAL)
    worst = max((level for level, *_ in results), key=order.index)
    shown = [text for level, _, text, _ in results if level is worst]
    text = "; ".join(shown[:10]) + (f"; and {len(shown) - 10} more" if len(shown) > 10 else "")  # noqa: PLR2004
    rows = [
        {
            "target": name,
            "status": level.name,
            "value": measured.value if measured is not None else None,
            "low": measured.low if measured is not None else None,
            "high": measured.high if measured is not None else None,
            "events": measured.events if measured is not None and measured.events >= 0 else None,
        }
        for level, name, _, measured in results
    ]
    performance = " ".join(
        f"'{name.replace(chr(39), '')}'={measured.value:.6g}"
        for _, name, _, measured in results
        if measured is not None
    )
    return _print_check(target, worst, text, rows, performance)


def _print_check(target: Target, level: Nagios, text: str, rows: list[dict[str, Any]], performance: str = "") -> int:
    if target.as_json:
        print_json("check", {"status": level.name, "text": text, "targets": rows})
    else:
        line = " ".join(printable(f"{level.name}: {text}").replace("|", "/").split())
        out.print(line + (f" | {printable(performance)}" if performance else ""), soft_wrap=True)
    return int(level)


def _measured(
    perf: AgentPerf, scope: Scope, pattern: str, condition: Condition, window: str
) -> dict[str, Measured | None]:
    """Read the value of each target whose name is `pattern` or matches it as a glob. A target without data has None."""
    if scope is Scope.AGENTS:
        snapshots = perf.metrics.snapshots(window=_seconds(window))
        chosen = {name: of for name, of in snapshots.items() if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        return {
            name: measured_agent(condition.measure, totals_of(of)) if of.task_count or _is_count(condition) else None
            for name, of in chosen.items()
        }
    if scope is Scope.CACHE:
        found: dict[str, Measured | None] = {}
        for cache in perf.caches():
            if cache.name == pattern or fnmatch.fnmatchcase(cache.name, pattern):
                value = float(getattr(cache, condition.measure))
                events = cache.hits + cache.misses if condition.measure == "hit_rate" else -1
                is_empty = condition.measure == "hit_rate" and not events
                found[cache.name] = None if is_empty else Measured(value, value, value, events, Interval(0.0, 0.0))
        return found
    found = {}
    for pool in perf.balancer().status():
        if pool.agent_type == pattern or fnmatch.fnmatchcase(pool.agent_type, pattern):
            value = pool_value(condition, PoolFigures.of(pool))
            found[pool.agent_type] = Measured(value, value, value, -1, Interval(0.0, 0.0))
    return found


def _is_count(condition: Condition) -> bool:
    measure = measure_of(condition.measure)
    return measure is not None and measure.is_count
