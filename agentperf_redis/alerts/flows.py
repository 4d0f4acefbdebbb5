"""The flows of alerts: deployment, evaluation, silences and reading. A flow is a generator that the backend runs."""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agentperf_redis import arguments, keys
from agentperf_redis.alerts import commands
from agentperf_redis.alerts.commands import Deployed
from agentperf_redis.alerts.evaluation import Verdict, judge, reason_of
from agentperf_redis.alerts.expression import Scope
from agentperf_redis.alerts.model import (
    AlertEvent,
    AlertState,
    AlertStatus,
    Evaluated,
    Measured,
    Notice,
    Overview,
    ReceiverStatus,
    RuleStatus,
    TargetState,
)
from agentperf_redis.alerts.rules import SEVERITIES_OF_SLO, Rule, RuleSet, read_rules
from agentperf_redis.alerts.values import Judged, judged_agent, judged_cache, judged_pool, totals_of
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.cache.flows.inspection import read_all_stats
from agentperf_redis.cache.model import KINDS
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument
from agentperf_redis.metrics import flows as metrics_flows
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.model import OTHER, Interval, PerformanceMetrics
from agentperf_redis.windows import Timestamp, timestamp_ms, window_seconds

_log = logging.getLogger("agentperf_redis")

AT_ONCE = 100
"""Max rules that a process claims at once. Rules with the same window share their reads."""
MAX_TARGETS = 2500
"""Max targets of one rule; the first ones by name. A namespace has at most some 2500 agents."""
_FORGET_MS = 86_400_000
"""The state of an agent, cache or pool that is gone is deleted after this time."""


class AlertService:
    """The state that the alerts of a process share: the server, the keys, and a copy of the deployed rules.

    Args:
        backend: the server and namespace.
        flusher: the metrics of this process.
    """

    def __init__(self, backend: Backend, flusher: Flusher) -> None:
        self.backend = backend
        self.flusher = flusher
        self.keys = keys.alerts(backend.namespace)
        self.balancer = LoadBalancer(backend=backend)
        self.version: int | None = None
        """Number of the deployment that this process has seen last; None before the first one."""
        self._known: Deployed | None = None

    def deployed(self, version: int | None = None) -> Flow[Deployed]:
        """Return the deployed rules. They are read from the server unless this process has a copy of this version."""
        known = self._known
        if known is None or version is None or known.version != version:
            known = self._known = yield from commands.rules(self.keys)
        self.version = known.version
        return known


@dataclass(frozen=True, slots=True)
class Deployment:
    """The result of a deployment.

    Attributes:
        number: number of the deployment; the first one is 1.
        rules: names of the rules.
        receivers: names of the receivers.
        removed: number of rules that were removed.
    """

    number: int
    rules: tuple[str, ...]
    receivers: tuple[str, ...]
    removed: int


def checked_rules(path: str | os.PathLike[str] | None, text: str | None) -> RuleSet:
    """Check the rules of a file, or of a text.

    Raises:
        InvalidArgument: `path` and `text` are both given or both missing, or the file cannot be read.
        InvalidRules: with all faults of the rules.
    """
    if (path is None) == (text is None):
        raise InvalidArgument("path", path, "the path of a rules file, or None with text=")
    if text is not None:
        if not isinstance(text, str):
            raise InvalidArgument("text", text, "the text of a rules file")
        return read_rules(text)
    try:
        return read_rules(Path(path or "").read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise InvalidArgument("path", path, f"a file of UTF-8 text that can be read ({error})") from None


def deploy(service: AlertService, path: str | os.PathLike[str] | None, text: str | None) -> Flow[Deployment]:
    """Replace all rules. The whole file is checked at the call, before the flow runs."""
    return _deploy(service, checked_rules(path, text))


def _deploy(service: AlertService, rules: RuleSet) -> Flow[Deployment]:
    version, removed = yield from commands.deploy(service.keys, rules)
    return Deployment(version, tuple(rule.name for rule in rules.rules), tuple(rules.addresses), removed)


def evaluate(service: AlertService, as_of: Timestamp) -> Flow[Evaluated]:
    """Evaluate the rules that are due."""
    return _evaluate(service, -1 if as_of is None else timestamp_ms("as_of", as_of))


def _evaluate(service: AlertService, as_of_ms: int) -> Flow[Evaluated]:
    token = secrets.token_hex(8)
    claimed = yield from commands.claim(service.keys, as_of_ms=as_of_ms, count=AT_ONCE, token=token)
    service.version = claimed.version
    if not claimed.due:
        return Evaluated((), (), claimed.wait)
    deployed = yield from service.deployed(claimed.version)
    by_name = {rule.name: rule for rule in deployed.rules.rules}
    due = [(by_name[name], at_ms) for name, at_ms in claimed.due if name in by_name]
    if deployed.version != claimed.version or not due:  # deployed after the claim: all deployed rules are due at once
        return Evaluated((), (), 0.0)
    silences = yield from commands.silences(service.keys)
    found = yield from Batch(tuple(commands.states(service.keys, rule.name) for rule, _ in due)).settled()
    errors = [state for state in found if isinstance(state, AgentPerfError)]
    states = {
        rule.name: state for (rule, _), state in zip(due, found, strict=True) if not isinstance(state, AgentPerfError)
    }
    judged = yield from _judged(service, [pair for pair in due if pair[0].name in states], states, errors)
    reports, events = [], []
    for rule, at_ms in due:
        if rule.name in judged:
            silenced = silences.get(rule.name, 0) > at_ms
            outcome = outcome_of(rule, states[rule.name], judged[rule.name], at_ms, silenced=silenced)
            events.append(outcome.events)
            reports.append(
                commands.report(
                    service.keys,
                    deployed.version,
                    rule.name,
                    token,
                    states=outcome.states,
                    gone=outcome.gone,
                    events=outcome.events,
                    notices=_notices(service, deployed.rules, rule, outcome),
                )
            )
    stored = yield from Batch(tuple(reports)).settled()
    errors += [each for each in stored if isinstance(each, AgentPerfError)]
    if errors:
        raise errors[0]
    return Evaluated(
        tuple(rule.name for rule, _ in due),
        tuple(event for of, is_stored in zip(events, stored, strict=True) if is_stored is True for event in of),
        claimed.wait,
    )


def _judged(
    service: AlertService,
    due: list[tuple[Rule, int]],
    states: Mapping[str, Mapping[str, TargetState]],
    errors: list[AgentPerfError],
) -> Flow[dict[str, dict[str, Judged]]]:
    """Read the values that rules watch, and judge them. Rules whose values cannot be read are left out.

    Returns the verdicts and values by rule and target.
    """
    found: dict[str, dict[str, Judged]] = {}
    agents = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.AGENTS]
    if agents:
        names = yield from metrics_flows.agent_names(service.flusher)
        found |= yield from _judged_agents(service, agents, names, errors)
    caches = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.CACHE]
    if caches:
        try:
            all_stats = yield from read_all_stats(service.backend)
        except AgentPerfError as error:
            _collect(errors, error)
        else:
            for rule, at_ms in caches:
                known = states[rule.name]
                by_name = {cache_target(each.kind, each.name): each for each in all_stats if rule.matches(each.name)}
                found[rule.name] = {
                    name: judged_cache(rule, stats, known[name].samples if name in known else "", at_ms)
                    for name, stats in sorted(by_name.items())[:MAX_TARGETS]
                }
    pools = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.POOL]
    if pools:
        try:
            all_pools = yield from service.balancer._operations.status(())  # noqa: SLF001  the flow of `status`
        except AgentPerfError as error:
            _collect(errors, error)
        else:
            for rule, at_ms in pools:
                matching = sorted((each for each in all_pools if rule.matches(each.agent_type)), key=_name_of_pool)
                found[rule.name] = {each.agent_type: judged_pool(rule, each, at_ms) for each in matching[:MAX_TARGETS]}
    return found


def _name_of_pool(pool: object) -> str:
    return str(getattr(pool, "agent_type", ""))


def cache_target(kind: str, name: str) -> str:
    """Return the name of a cache as a target: it also tells a tiered cache from an LRU cache of the same name."""
    return name if kind == KINDS["cache"] else f"{name} ({kind})"


def _judged_agents(
    service: AlertService, due: list[tuple[Rule, int]], names: list[str], errors: list[AgentPerfError]
) -> Flow[dict[str, dict[str, Judged]]]:
    targets = {rule.name: matching(rule, names) for rule, _ in due}
    wanted: dict[tuple[float, int], set[str]] = {}
    for rule, at_ms in due:
        for window in rule.windows:
            wanted.setdefault((window, at_ms), set()).update(targets[rule.name])
    read: dict[tuple[float, int], dict[str, PerformanceMetrics]] = {}
    for (window, at_ms), agents in wanted.items():
        try:
            read[window, at_ms] = yield from metrics_flows.chosen(service.flusher, sorted(agents), window, at_ms / 1000)
        except AgentPerfError as error:
            _collect(errors, error)
    found = {}
    for rule, at_ms in due:
        if all((window, at_ms) in read for window in rule.windows):
            found[rule.name] = {
                name: judged_agent(rule, {window: totals_of(read[window, at_ms][name]) for window in rule.windows})
                for name in targets[rule.name]
            }
    return found


def matching(rule: Rule, names: Iterable[str]) -> list[str]:
    """Return the agents that a rule watches, without `__other__`, the name that agents beyond the limit share."""
    return [name for name in names if rule.matches(name) and name != OTHER][:MAX_TARGETS]


def _collect(errors: list[AgentPerfError], error: AgentPerfError) -> None:
    """Keep the error of one read, so that the other rules are evaluated. Raise it if the server is unreachable."""
    if isinstance(error, BackendUnavailable):
        raise error
    errors.append(error)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the evaluation of one rule.

    Attributes:
        states: the next states, by target.
        gone: targets whose states are deleted.
        events: the transitions.
        notices: each notification to send: its kind and its event.
    """

    states: dict[str, TargetState]
    gone: list[str]
    events: list[AlertEvent]
    notices: list[tuple[Notice, AlertEvent]]


def outcome_of(
    rule: Rule, states: Mapping[str, TargetState], judged: Mapping[str, Judged], at_ms: int, *, silenced: bool
) -> Outcome:
    """Judge all targets of a rule, including those that have a state but are gone."""
    outcome = Outcome({}, [], [], [])
    for name in {**states, **judged}:
        before = states.get(name)
        found, measured = judged.get(name, (Verdict.NO_DATA, None))
        ended = ""
        if name not in judged and before is not None:
            if not rule.matches(name.removesuffix(f" ({KINDS['tiered']})")):
                ended = "the rule no longer watches it"
            elif at_ms - before.data_ms > _FORGET_MS:
                ended = "it is gone"
        if ended and before is not None:
            outcome.gone.append(name)
            if before.state is AlertState.FIRING:
                notice = Notice.RESOLVED if before.notified_ms else None
                after = replace(before, state=AlertState.OK, seen_ms=at_ms)
                _add_event(outcome, rule, name, before.state, after, None, notice, ended, transition=True)
            continue
        judgement = judge(rule, before, found, measured, at_ms, silenced=silenced)
        outcome.states[name] = judgement.state
        old = before.state if before is not None else AlertState.OK
        if judgement.changed or judgement.notice is not None:
            reason = reason_of(rule, old, judgement.state.state, found, judgement.state)
            _add_event(
                outcome,
                rule,
                name,
                old,
                judgement.state,
                measured,
                judgement.notice,
                reason,
                transition=judgement.changed,
            )
    return outcome


def _add_event(
    outcome: Outcome,
    rule: Rule,
    target: str,
    before: AlertState,
    state: TargetState,
    measured: Measured | None,
    notice: Notice | None,
    reason: str,
    *,
    transition: bool,
) -> None:
    at = state.seen_ms / 1000
    known = measured is not None and math.isfinite(measured.low) and math.isfinite(measured.high)
    event = AlertEvent(
        event_id(state.seen_ms),
        rule.name,
        target,
        before,
        state.state,
        at,
        measured.value if measured is not None and known else None,
        measured.low if measured is not None and known else None,
        measured.high if measured is not None and known else None,
        measured.interval if measured is not None else Interval(at - rule.window, at),
        reason,
    )
    if transition:
        outcome.events.append(event)
    if notice is not None:
        outcome.notices.append((notice, event))


def event_id(at_ms: int) -> str:
    """Return a new id. Ids sort by their time."""
    return f"{at_ms:015d}-{secrets.token_hex(6)}"


def _notices(service: AlertService, rules: RuleSet, rule: Rule, outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return address, id and payload of each notification of an outcome."""
    found = []
    for notice, event in outcome.notices:
        payload = json.dumps(_payload(service.backend.namespace, rule, notice, event), ensure_ascii=False)
        for receiver in rule.notify:
            found += [(address.name, event.id, payload) for address in rules.addresses.get(receiver, ())]
    return found


def _payload(namespace: str, rule: Rule, notice: Notice, event: AlertEvent) -> dict[str, object]:
    """Return the notification as receivers get it."""
    return {
        "id": event.id,
        "kind": notice.value,
        "namespace": namespace,
        "rule": rule.name,
        rule.scope.value.removesuffix("s"): event.target,
        "target": event.target,
        "severity": rule.severity,
        "state": event.after.value,
        "before": event.before.value,
        "when": rule.text,
        "value": event.value,
        "low": event.low,
        "high": event.high,
        "start": event.interval.start,
        "end": event.interval.end,
        "at": event.at,
        "reason": event.reason,
    }


def silence(service: AlertService, rule: str, seconds: str | float, as_of: Timestamp) -> Flow[float]:
    """Silence rules. Returns the end of the silence, s since 1970."""
    checked = window_seconds(seconds, "seconds")
    as_of_ms = -1 if as_of is None else timestamp_ms("as_of", as_of)
    return _silence(service, arguments.name("rule", rule), round(checked * 1000), as_of_ms)


def unsilence(service: AlertService, rule: str) -> Flow[float]:
    """End the silence of rules. Returns the present time of the server, s since 1970."""
    return _silence(service, arguments.name("rule", rule), 0, -1)


def _silence(service: AlertService, rule: str, for_ms: int, as_of_ms: int) -> Flow[float]:
    deployed = yield from service.deployed()
    names = [each.name for each in deployed.rules.rules]
    chosen = [name for name in names if is_meant(rule, name)]
    found: list[str] = []
    until_ms = 0
    if chosen:
        event = event_id(max(0, as_of_ms))
        until_ms, found = yield from commands.silence(
            service.keys, chosen, for_ms=for_ms, as_of_ms=as_of_ms, event=event
        )
    if not found:
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")  # noqa: PLR2004  names shown
        raise InvalidArgument("rule", rule, f"the name of a deployed rule, or a glob: {shown or 'none is deployed'}")
    return until_ms / 1000


def is_meant(pattern: str, name: str) -> bool:
    """Whether a pattern selects a rule: the pattern is the rule's name, the name of its SLO, or a matching glob."""
    return (
        name == pattern
        or any(name == f"{pattern} ({severity})" for severity in SEVERITIES_OF_SLO)
        or fnmatch.fnmatchcase(name, pattern)
    )


def log(service: AlertService, rule: str | None, limit: int) -> Flow[tuple[AlertEvent, ...]]:
    """Read the last transitions, oldest first."""
    checked = None if rule is None else arguments.name("rule", rule)
    return _log_of(service, checked, arguments.count("limit", limit, maximum=5000))


def _log_of(service: AlertService, rule: str | None, limit: int) -> Flow[tuple[AlertEvent, ...]]:
    events = yield from commands.events(service.keys, limit if rule is None else 5000)
    return tuple(event for event in events if rule is None or is_meant(rule, event.rule))[-limit:]


_ORDER = {state: order for order, state in enumerate((AlertState.FIRING, AlertState.SILENCED, AlertState.PENDING))}


def overview(service: AlertService) -> Flow[Overview]:
    """Read all rules, states and receivers."""
    deployed = yield from service.deployed()
    rules = deployed.rules.rules
    silences = yield from commands.silences(service.keys)
    schedule = yield from commands.schedule(service.keys)
    receivers = yield from commands.receivers(service.keys)
    states = yield from Batch(tuple(commands.states(service.keys, rule.name) for rule in rules))
    addresses = [address for of in deployed.rules.addresses.values() for address in of]
    waiting = yield from Batch(tuple(commands.waiting(service.keys, address.name) for address in addresses))
    alerts, shown = [], []
    for rule, by_target in zip(rules, states, strict=True):
        every_ms, due_ms = schedule.get(rule.name, (0, 0))
        judged_ms = max(due_ms - every_ms, 0)
        silenced = silences.get(rule.name, 0)
        until = (
            silenced / 1000 if silenced > max(judged_ms, *(state.seen_ms for state in by_target.values()), 0) else None
        )
        shown.append(
            RuleStatus(
                rule.name,
                rule.severity,
                rule.text,
                rule.scope.value,
                rule.pattern,
                rule.window,
                judged_ms / 1000 or None,
                until,
                len(by_target),
            )
        )
        alerts += [_status(rule, target, state, until) for target, state in by_target.items()]
    return Overview(
        deployed.version,
        deployed.deployed_ms / 1000 or None,
        tuple(sorted(alerts, key=lambda each: (_ORDER.get(each.state, len(_ORDER)), each.rule, each.target))),
        tuple(sorted(shown, key=lambda each: each.name)),
        tuple(
            ReceiverStatus(
                address.name,
                address.masked,
                count,
                state.attempts,
                state.error or None,
                state.failed_ms / 1000 or None,
                state.dropped,
            )
            for address, count in zip(addresses, waiting, strict=True)
            for state in [receivers.get(address.name, commands.AddressState())]
        ),
    )


def _status(rule: Rule, target: str, state: TargetState, silenced_until: float | None) -> AlertStatus:
    is_silenced = silenced_until is not None and state.state is AlertState.FIRING
    value, low, high = (None if math.isnan(number) else number for number in (state.value, state.low, state.high))
    return AlertStatus(
        rule.name,
        target,
        rule.scope.value,
        rule.severity,
        AlertState.SILENCED if is_silenced else state.state,
        state.since_ms / 1000,
        value,
        low,
        high,
        state.seen_ms / 1000,
        rule.text,
        silenced_until,
    )
