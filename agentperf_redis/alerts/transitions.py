"""Turns verdicts into the next state of each target, and into the events and notifications of a rule."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from agentperf_redis.alerts.evaluation import Verdict, judge, reason_of
from agentperf_redis.alerts.expression import Scope
from agentperf_redis.alerts.model import (
    AlertEvent,
    AlertState,
    Measured,
    Notice,
    TargetState,
)
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.targets import cache_of_target
from agentperf_redis.alerts.values import Judged
from agentperf_redis.metrics.model import Interval

_FORGET_MS = 86_400_000
"""If an agent, cache or pool is gone, its state is deleted after this time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the evaluation of one rule.

    Attributes:
        states: the next states, by target.
        gone: targets whose states are deleted.
        events: the transitions.
        notices: the notifications to send, each as a pair of its kind and its event.
    """

    states: dict[str, TargetState]
    gone: list[str]
    events: list[AlertEvent]
    notices: list[tuple[Notice, AlertEvent]]


def outcome_of(
    rule: Rule, states: Mapping[str, TargetState], judged: Mapping[str, Judged], at_ms: int, *, silenced: bool
) -> Outcome:
    """Judge all targets of a rule, including targets that have a stored state but no longer exist."""
    outcome = Outcome({}, [], [], [])
    for name in {**states, **judged}:
        before = states.get(name)
        found, measured = judged.get(name, (Verdict.NO_DATA, None))
        ended = ""
        if name not in judged and before is not None:
            if not rule.matches(cache_of_target(name)[0] if rule.scope is Scope.CACHE else name):
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


def payload(namespace: str, rule: Rule, notice: Notice, event: AlertEvent) -> dict[str, object]:
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
