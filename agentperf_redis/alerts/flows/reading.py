"""Reading the log of transitions, and all rules with their states."""

from __future__ import annotations

import math

from agentperf_redis import arguments
from agentperf_redis.alerts import commands
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.flows.silences import is_meant
from agentperf_redis.alerts.model import (
    AlertEvent,
    AlertState,
    AlertStatus,
    Overview,
    ReceiverStatus,
    RuleStatus,
    TargetState,
)
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.command import Batch, Flow


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
