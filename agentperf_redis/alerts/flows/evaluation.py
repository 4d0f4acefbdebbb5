"""Evaluating the rules that are due: claim them, read their values, judge them, report the new states."""

from __future__ import annotations

import json
import secrets

from agentperf_redis.alerts import commands
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.flows.targets import judged_targets
from agentperf_redis.alerts.model import (
    Evaluated,
)
from agentperf_redis.alerts.rules import Rule, RuleSet
from agentperf_redis.alerts.transitions import Outcome, outcome_of, payload
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.windows import Timestamp, timestamp_ms

AT_ONCE = 100
"""Max rules that a process claims at once. Rules with the same window share their reads."""


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
    if deployed.version != claimed.version or not due:  # new rules were deployed after the claim, and are due now
        return Evaluated((), (), 0.0)
    silences = yield from commands.silences(service.keys)
    found = yield from Batch(tuple(commands.states(service.keys, rule.name) for rule, _ in due)).settled()
    errors = [state for state in found if isinstance(state, AgentPerfError)]
    states = {
        rule.name: state for (rule, _), state in zip(due, found, strict=True) if not isinstance(state, AgentPerfError)
    }
    judged = yield from judged_targets(service, [pair for pair in due if pair[0].name in states], states, errors)
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


def _notices(service: AlertService, rules: RuleSet, rule: Rule, outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return address, id and payload of each notification of an outcome."""
    found = []
    for notice, event in outcome.notices:
        text = json.dumps(payload(service.backend.namespace, rule, notice, event), ensure_ascii=False)
        for receiver in rule.notify:
            found += [(address.name, event.id, text) for address in rules.addresses.get(receiver, ())]
    return found
