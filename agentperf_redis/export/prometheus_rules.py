"""Alerting rules for Prometheus from a rules file of `agentperf alerts`, over the metrics of the Prometheus exporter.

This is for teams that already use Alertmanager: Prometheus evaluates the rules instead of this library. The evaluation
by Prometheus is less exact. Percentiles come from buckets whose bounds are powers of two, and an estimate near the
threshold may change the state of an alert. A rule that would mean something else in Prometheus is left out; the reason
is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agentperf_redis.alerts.expression import Condition, Scope, share_of
from agentperf_redis.alerts.rules import Objective, Rule, RuleSet
from agentperf_redis.export import families
from agentperf_redis.export.families import Family
from agentperf_redis.export.histograms import BOUNDS
from agentperf_redis.export.text import exposed_name

MIN_WINDOW_S = 60.0
"""A rate needs two scrapes in its window, better four. At the usual interval of 15 s, four scrapes take a minute."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A rule that Prometheus cannot express.

    Attributes:
        rule: name of the rule.
        reason: why Prometheus cannot express the rule, as a sentence.
    """

    rule: str
    reason: str


class _Inexpressible(Exception):
    """PromQL cannot express a rule. The text of this exception is the reason."""


def rules_file(rules: RuleSet) -> tuple[str, tuple[LeftOut, ...]]:
    """Return the rules as a YAML file for `rule_files` of Prometheus, and the rules that were left out of this file."""
    groups: dict[int, list[str]] = {}
    left_out: list[LeftOut] = []
    for rule in rules.rules:
        try:
            lines = list(_lines(rule, expression(rule)))
        except _Inexpressible as reason:
            left_out.append(LeftOut(rule.name, str(reason)))
        else:
            groups.setdefault(rule.every, []).extend(lines)
    if not groups:
        return "groups: []\n", tuple(left_out)
    text = ["groups:"]
    for every, lines in groups.items():
        text += [f"  - name: agentperf-{every}s", f"    interval: {every}s", "    rules:", *lines]
    return "\n".join(text) + "\n", tuple(left_out)


def _lines(rule: Rule, expr: str) -> Iterator[str]:
    """Yield the YAML lines of a rule. Texts are JSON strings, which are also valid double-quoted scalars in YAML."""
    label = _LABELS[rule.scope]
    yield f"      - alert: {json.dumps(rule.name)}"
    yield f"        expr: {json.dumps(expr)}"
    if rule.hold:
        yield f"        for: {_duration(rule.hold)}"
    if rule.keep_firing:
        yield f"        keep_firing_for: {_duration(rule.keep_firing)}"
    yield f"        labels: {{severity: {json.dumps(rule.severity)}}}"
    yield "        annotations:"
    yield f"          summary: {json.dumps(f'{{{{ $labels.{label} }}}}: {rule.text}')}"
    yield '          description: "the value is {{ $value }}"'


def expression(rule: Rule) -> str:
    """Return the PromQL expression of a rule.

    Raises:
        _Inexpressible: PromQL cannot express the rule over the exported metrics.
    """
    if rule.window < MIN_WINDOW_S and rule.scope is not Scope.POOL:
        raise _Inexpressible(
            f"its window is shorter than {_duration(MIN_WINDOW_S)}, too short for the rate of a scrape"
        )
    chosen = _Chosen(_LABELS[rule.scope], rule.pattern)
    if rule.objective is not None:
        expr = _burning(rule, rule.objective, chosen)
    elif rule.when is not None:
        expr = _compared(rule.when, chosen, _duration(rule.window))
        if rule.resolve is not None:
            still = _compared(rule.resolve, chosen, _duration(rule.window), sign=_NEGATED[rule.resolve.sign])
            firing = f'ALERTS{{alertname={json.dumps(rule.name, ensure_ascii=False)},alertstate="firing"}}'
            expr = f"{expr} or ({still} and on ({chosen.label}) {firing})"
    else:
        raise _Inexpressible("it has neither a condition nor an objective")
    events = _EVENTS.get(rule.scope)
    if events is not None:
        seen = chosen.summed("increase", events, _duration(rule.window))
        if rule.min_events:
            expr = f"({expr}) and on ({chosen.label}) {seen} >= {rule.min_events}"
        if rule.no_data == "alert":
            expr = f"({expr}) or {seen} == 0"
    return expr


_LABELS = {Scope.AGENTS: "agent", Scope.CACHE: "cache", Scope.POOL: "pool"}
_EVENTS = {Scope.AGENTS: families.EXECUTIONS, Scope.CACHE: families.CACHE_REQUESTS}
"""The counter of the events that `min_events` counts."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The targets of a rule: a label, and a glob that the values of the label must match."""

    label: str
    pattern: str

    @property
    def matcher(self) -> str:
        if not re.search(r"[*?\[]", self.pattern):
            return f"{self.label}={json.dumps(self.pattern, ensure_ascii=False)}"
        return f"{self.label}=~{json.dumps(regex_of(self.pattern), ensure_ascii=False)}"

    def selected(self, name: str, where: str = "") -> str:
        return f"{name}{{{self.matcher}{',' if where else ''}{where}}}"

    def summed(self, function: str, family: Family, window: str, where: str = "") -> str:
        """Return the rate or the increase of a counter, summed over its other labels."""
        return f"sum by ({self.label}) ({function}({self.selected(exposed_name(family), where)}[{window}]))"

    def total(self, family: Family, where: str = "") -> str:
        """Return a gauge, summed over its other labels."""
        return f"sum by ({self.label}) ({self.selected(family.name, where)})"


def regex_of(pattern: str) -> str:
    """Convert a glob to a regular expression for Prometheus (RE2). Prometheus matches it against the whole value."""
    found, at = "", 0
    while at < len(pattern):
        character = pattern[at]
        end = pattern.find("]", at + 2 + pattern[at + 1 : at + 2].count("!"))
        at += 1
        if character == "*":
            found += ".*"
        elif character == "?":
            found += "."
        elif character == "[" and end > 0:
            inside = pattern[at:end].replace("\\", r"\\").replace("[", r"\[")
            inside = "^" + inside[1:] if inside.startswith("!") else inside.replace("^", r"\^")
            found += f"[{inside.replace(']', chr(92) + ']')}]"
            at = end + 1
        else:
            found += character if character.isalnum() or character in " _-/:@%,'\"~#&=!<>" else _escaped(character)
    return found


def _escaped(character: str) -> str:
    return f"\\{character}" if character.isascii() else character


_FAILED = 'outcome="failure"'


def _share(chosen: _Chosen, family: Family, where: str, window: str) -> str:
    return f"{chosen.summed('rate', family, window, where)} / {chosen.summed('rate', family, window)}"


def _quantile(share: float, chosen: _Chosen, window: str) -> str:
    buckets = chosen.selected(f"{families.DURATIONS.name}_bucket")
    return f"histogram_quantile({share:.10g}, sum by ({chosen.label}, le) (rate({buckets}[{window}])))"


def _average(chosen: _Chosen, window: str) -> str:
    total, count = (chosen.selected(f"{families.DURATIONS.name}_{suffix}") for suffix in ("sum", "count"))
    return f"sum by ({chosen.label}) (rate({total}[{window}])) / sum by ({chosen.label}) (rate({count}[{window}]))"


_FIGURES: dict[str, Callable[[_Chosen, str], str]] = {
    "avg": _average,
    "failure_rate": lambda chosen, window: _share(chosen, families.EXECUTIONS, _FAILED, window),
    "success_rate": lambda chosen, window: _share(chosen, families.EXECUTIONS, 'outcome="success"', window),
    "tasks": lambda chosen, window: chosen.summed("increase", families.EXECUTIONS, window),
    "errors": lambda chosen, window: chosen.summed("increase", families.EXECUTIONS, window, _FAILED),
    "throughput": lambda chosen, window: chosen.summed("rate", families.EXECUTIONS, window),
    "tokens": lambda chosen, window: chosen.summed("increase", families.TOKENS, window),
    "cost": lambda chosen, window: chosen.summed("increase", families.COST, window),
    "hit_rate": lambda chosen, window: _share(chosen, families.CACHE_REQUESTS, 'result="hit"', window),
    "evictions": lambda chosen, window: chosen.summed("increase", families.CACHE_EVICTIONS, window),
    "size": lambda chosen, _: chosen.total(families.CACHE_ENTRIES),
    "bytes": lambda chosen, _: chosen.total(families.CACHE_BYTES),
    "load": lambda chosen, _: chosen.total(families.POOL_LOAD),
    "healthy": lambda chosen, _: chosen.total(families.POOL_HEALTHY),
    "unhealthy": lambda chosen, _: f"{chosen.total(families.POOL_INSTANCES)} - {chosen.total(families.POOL_HEALTHY)}",
    "waiters": lambda chosen, _: chosen.total(families.POOL_WAITERS),
    "overdue": lambda chosen, _: chosen.total(families.POOL_OVERDUE),
}


_NEGATED = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}


def _compared(when: Condition, chosen: _Chosen, window: str, sign: str | None = None) -> str:
    share = share_of(when.measure)
    if share:
        figure = _quantile(share, chosen, window)
    elif when.measure in _FIGURES:
        figure = _FIGURES[when.measure](chosen, window)
    else:
        raise _Inexpressible(f"no exported metric has the figure {when.measure}")
    if when.is_relative:
        figure = f"{figure} / {chosen.total(families.POOL_CAPACITY)}"
    return f"{figure} {sign or when.sign} {when.threshold:.10g}"


def _burning(rule: Rule, objective: Objective, chosen: _Chosen) -> str:
    def bad(seconds: float) -> str:
        window = _duration(seconds)
        if objective.under_s is None:
            return _share(chosen, families.EXECUTIONS, _FAILED, window)
        le = f'le="{objective.under_s}"'
        good = chosen.selected(f"{families.DURATIONS.name}_bucket", le)
        count = chosen.selected(f"{families.DURATIONS.name}_count")
        of = f"sum by ({chosen.label})"
        return f"1 - {of} (rate({good}[{window}])) / {of} (rate({count}[{window}]))"

    if objective.under_s is not None and objective.under_s not in BOUNDS:
        raise _Inexpressible("its duration is no bound of a classic bucket: a power of two from 1/1024 s to 4096 s")
    return " or ".join(
        f"({bad(burn.long_s)} > {burn.factor * objective.budget:.10g} "
        f"and {bad(burn.short_s)} > {burn.factor * objective.budget:.10g})"
        for burn in rule.burns
    )


def _duration(seconds: float) -> str:
    """Return a duration as Prometheus writes it: ``90s``, ``5m``, ``2h``, ``3d``."""
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s" if seconds == round(seconds) else f"{seconds * 1000:.0f}ms"
