"""Judges rules on measured values. This module does no I/O: live evaluation and replay share it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from agentperf_redis.alerts.expression import Truth, value_text
from agentperf_redis.alerts.model import AlertState, Measured, Notice, TargetState
from agentperf_redis.alerts.rules import Rule

_OK, _PENDING, _FIRING, _NO_DATA = AlertState.OK, AlertState.PENDING, AlertState.FIRING, AlertState.NO_DATA


class Verdict(Enum):
    """The result of a rule's condition for one target."""

    HOLDS = "holds"
    CLEAR = "clear"
    """The condition does not hold, and the value has reached the level that ends an alert."""
    BETWEEN = "between"
    """The condition does not hold, but the value has not reached the level that ends an alert."""
    UNDECIDED = "undecided"
    """The value is within its error bound of the threshold, or the window has too few executions."""
    NO_DATA = "no data"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of an evaluation of one target.

    Attributes:
        state: the next state.
        changed: whether the state differs from the one before.
        notice: the kind of notification to send; None for none.
    """

    state: TargetState
    changed: bool
    notice: Notice | None


def verdict(rule: Rule, measured: Measured | None) -> Verdict:
    """Judge a value. None stands for a target without data."""
    if measured is None:
        return Verdict.NO_DATA
    if not rule.zero_is_data and measured.events == 0:
        return Verdict.NO_DATA
    if 0 <= measured.events < rule.min_events:
        return Verdict.UNDECIDED
    return threshold_verdict(rule, measured.low, measured.high)


def threshold_verdict(rule: Rule, low: float, high: float) -> Verdict:
    """Compare a value, which lies between `low` and `high`, with the thresholds of a rule."""
    assert rule.when is not None  # noqa: S101  burn-rate rules have no condition; `burn_verdict` judges them
    truth = rule.when.truth(low, high)
    if truth is Truth.TRUE:
        return Verdict.HOLDS
    if truth is Truth.UNDECIDED:
        return Verdict.UNDECIDED
    if rule.resolve is None or rule.resolve.truth(low, high) is Truth.TRUE:
        return Verdict.CLEAR
    return Verdict.BETWEEN


@dataclass(frozen=True, slots=True)
class BurnCounts:
    """The number of executions in one window, and how many of them are bad by an objective.

    Attributes:
        executions: number of executions.
        bad_low: the smallest possible number of bad executions.
        bad_high: the largest possible number of bad executions.
    """

    executions: int
    bad_low: int
    bad_high: int


def burn_verdict(rule: Rule, counts: Mapping[float, BurnCounts]) -> tuple[Verdict, float, float, float]:
    """Judge a burn-rate rule.

    The alert holds if, for one pair of windows, the burn rates in both windows are above the pair's factor. A window
    without executions decides nothing. So an alert does not end only because the traffic ended.

    Args:
        rule: the rule.
        counts: the counts of each window, by its length, s.

    Returns:
        The verdict, and three numbers about one burn rate: its estimate, its smallest and its largest possible value.
        The burn rate is taken from the long window of one pair: the pair whose burn rate is the largest multiple of its
        factor. All three numbers are NaN if no long window has executions.
    """
    assert rule.objective is not None  # noqa: S101  the caller passes burn-rate rules only
    budget = rule.objective.budget
    pairs, shown = [], (-1.0, math.nan, math.nan, math.nan)
    for burn in rule.burns:
        long, short = counts[burn.long_s], counts[burn.short_s]
        if long.executions == 0:
            pairs.append(Verdict.NO_DATA)
            continue
        low, high = (bad / long.executions / budget for bad in (long.bad_low, long.bad_high))
        shown = max(shown, (high / burn.factor, (low + high) / 2, low, high))
        decided = [_above(long, budget, burn.factor), _above(short, budget, burn.factor)]
        if Truth.FALSE in decided:
            pairs.append(Verdict.CLEAR)
        elif Truth.UNDECIDED in decided or long.executions < rule.min_events:
            pairs.append(Verdict.UNDECIDED)
        else:
            pairs.append(Verdict.HOLDS)
    _, value, low, high = shown
    for found in (Verdict.HOLDS, Verdict.UNDECIDED, Verdict.CLEAR):
        if found in pairs:
            return found, value, low, high
    return Verdict.NO_DATA, value, low, high


def _above(window: BurnCounts, budget: float, factor: float) -> Truth:
    if window.executions == 0:
        return Truth.UNDECIDED
    limit = factor * budget * window.executions
    if window.bad_low > limit:
        return Truth.TRUE
    return Truth.FALSE if window.bad_high <= limit else Truth.UNDECIDED


def judge(
    rule: Rule,
    before: TargetState | None,
    found: Verdict,
    measured: Measured | None,
    at_ms: int,
    *,
    silenced: bool = False,
    interval_ms: int | None = None,
) -> Judgement:
    """Return the state that follows from a verdict, and the notification to send.

    The times `for` and `keep_firing_for` of a rule count observed time only. Two kinds of time are not observed: the
    time between an undecided evaluation and the evaluation before it, and the time in which no process evaluated. If
    evaluations are missed, up to two intervals still count as observed, because a process that ends while it evaluates
    makes its rules miss one interval.

    Args:
        rule: the rule.
        before: the previous state; None if there was none.
        found: the verdict.
        measured: the value that was judged; None without data.
        at_ms: time of the evaluation, ms since 1970.
        silenced: whether the rule is silenced.
        interval_ms: time from one evaluation to the next, ms; None: the rule's interval.
    """
    old = before or TargetState(since_ms=at_ms, seen_ms=at_ms, data_ms=at_ms)
    passed = max(0, at_ms - old.seen_ms)
    keeps = found is Verdict.UNDECIDED or (found is Verdict.NO_DATA and rule.no_data == "keep" and old.state is _FIRING)
    unobserved = passed if keeps else max(0, passed - 2 * (interval_ms or 1000 * rule.every))
    timer = old.timer_ms + unobserved if old.timer_ms else 0
    state = old.state
    if not keeps:
        state, timer = _next(rule, old.state, timer, found, at_ms)
    changed = state is not old.state
    notice: Notice | None = None
    notified = old.notified_ms
    if state is _FIRING and not silenced:
        if notified == 0:
            notice = Notice.FIRING
        elif rule.renotify is not None and at_ms - notified >= rule.renotify * 1000:
            notice = Notice.REMINDER
        notified = at_ms if notice is not None else notified
    elif state is not _FIRING:
        # Send this notice even during a silence: a receiver that got the alert may be waiting for the end of the alert.
        notice = Notice.RESOLVED if changed and old.state is _FIRING and notified else None
        notified = 0
    next_state = replace(
        old,
        state=state,
        since_ms=at_ms if changed else old.since_ms,
        timer_ms=timer,
        seen_ms=at_ms,
        notified_ms=notified,
    )
    if measured is not None:
        next_state = replace(
            next_state,
            data_ms=at_ms,
            value=measured.value,
            low=measured.low,
            high=measured.high,
            samples=measured.samples,
        )
    return Judgement(next_state, changed, notice)


def _next(rule: Rule, state: AlertState, timer: int, found: Verdict, at_ms: int) -> tuple[AlertState, int]:
    """Return the next state and its timer, for a verdict other than UNDECIDED."""
    if found is Verdict.NO_DATA:
        if rule.no_data == "alert":
            found = Verdict.HOLDS
        elif rule.no_data == "ok":
            found = Verdict.CLEAR
        else:
            return _NO_DATA, 0
    if found is Verdict.HOLDS:
        if state is _FIRING:
            return _FIRING, 0
        since = timer if state is _PENDING and timer else at_ms
        return (_FIRING, 0) if at_ms - since >= rule.hold * 1000 else (_PENDING, since)
    if state is not _FIRING:
        return _OK, 0
    if found is Verdict.BETWEEN:
        return _FIRING, 0
    clear_since = timer or at_ms
    return (_OK, 0) if at_ms - clear_since >= rule.keep_firing * 1000 else (_FIRING, clear_since)


def reason_of(rule: Rule, before: AlertState, after: AlertState, found: Verdict, state: TargetState) -> str:
    """Return a sentence that says why a state changed."""
    if found is Verdict.NO_DATA:
        return "the window has no data" + (f", and no_data is {rule.no_data}" if after is not _NO_DATA else "")
    relative = rule.when is not None and rule.when.is_relative
    value = value_text(rule.measure, state.value, is_relative=relative) if not math.isnan(state.value) else "no value"
    if after is _FIRING:
        held = f" for {rule.hold:g} s" if rule.hold else ""
        return f"{rule.measure} is {value}: {rule.text}{held}"
    if after is _PENDING:
        return f"{rule.measure} is {value}: {rule.text}, not yet for {rule.hold:g} s"
    if before is _FIRING:
        level = rule.resolve.text if rule.resolve is not None else f"not {rule.text}"
        return f"{rule.measure} is {value}: {level}"
    return f"{rule.measure} is {value}"
