"""States, events and results of alerts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from agentperf_redis.keys import decoded, encoded
from agentperf_redis.metrics.model import Interval


class AlertState(Enum):
    """The state of a rule for one agent, cache or pool."""

    OK = "ok"
    PENDING = "pending"
    """The condition holds, but not for as long as `for` demands."""
    FIRING = "firing"
    NO_DATA = "no_data"
    """The window has no executions, or the agent, cache or pool is gone."""
    SILENCED = "silenced"
    """The alert fires, and no notification is sent until the silence ends."""


class Notice(Enum):
    """The kind of a notification."""

    FIRING = "firing"
    REMINDER = "reminder"
    """The alert still fires after `renotify`."""
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Measured:
    """The value of a measure in a window.

    Attributes:
        value: the value, or its estimate.
        low: the smallest possible exact value.
        high: the largest possible exact value.
        events: number of executions, or of cache reads, in the window; -1 if the measure is based on neither.
        interval: the time range that the value covers.
        samples: counters of a cache that the next evaluation needs, as text.
    """

    value: float
    low: float
    high: float
    events: int
    interval: Interval
    samples: str = ""


_NUMBER = r"\d{1,16}"
_FLOAT = r"-?(?:\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?|-)"
_RECORD = re.compile(
    rf"state=(ok|pending|firing|no_data) since=({_NUMBER}) timer=({_NUMBER}) seen=({_NUMBER}) data=({_NUMBER}) "
    rf"notified=({_NUMBER}) value=({_FLOAT}) low=({_FLOAT}) high=({_FLOAT}) samples=([\d:,]{{0,2000}})"
)


@dataclass(frozen=True, slots=True)
class TargetState:
    """The stored state of a rule for one target: an agent, a cache or a pool. Times are ms since 1970.

    Attributes:
        state: OK, PENDING, FIRING or NO_DATA.
        since_ms: when the state began.
        timer_ms: while PENDING, when the condition began to hold. While FIRING, when the condition that ends the alert
            began to hold; 0 if it does not hold now. Time that was not observed does not count: the timestamp is moved
            forward by the length of that time.
        seen_ms: time of the last evaluation.
        data_ms: time of the last evaluation that found data.
        notified_ms: time of the last notification of the present alert; 0 if there was none.
        value: the value at `data_ms`; NaN if there was none.
        low: the smallest possible exact value at that time.
        high: the largest possible exact value at that time.
        samples: as in `Measured`.
    """

    state: AlertState = AlertState.OK
    since_ms: int = 0
    timer_ms: int = 0
    seen_ms: int = 0
    data_ms: int = 0
    notified_ms: int = 0
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    samples: str = ""

    def packed(self) -> str:
        """Return the stored record."""
        value, low, high = (_packed(number) for number in (self.value, self.low, self.high))
        return (
            f"state={self.state.value} since={self.since_ms} timer={self.timer_ms} seen={self.seen_ms} "
            f"data={self.data_ms} notified={self.notified_ms} value={value} low={low} high={high} "
            f"samples={self.samples}"
        )

    @classmethod
    def unpacked(cls, text: str) -> TargetState:
        """Read a stored record.

        Raises:
            ValueError: the text is no record.
        """
        found = _RECORD.fullmatch(text)
        if found is None:
            raise ValueError(text)
        state, *rest = found.groups()
        numbers = [int(each) for each in rest[:5]]
        if max(numbers) > _LAST_MS:
            raise ValueError(text)
        since, timer, seen, data, notified = numbers
        value, low, high = map(_unpacked, rest[5:8])
        return cls(AlertState(state), since, timer, seen, data, notified, value, low, high, rest[8])


_LAST_MS = 253_402_300_799_000
"""The end of the year 9999."""


def _packed(number: float) -> str:
    return "-" if not math.isfinite(number) else f"{number:.12g}"


def _unpacked(text: str) -> float:
    number = math.nan if text == "-" else float(text)
    if math.isinf(number):
        raise ValueError(text)
    return number


@dataclass(frozen=True, slots=True)
class AlertEvent:
    """A transition of an alert, or the start or end of a silence.

    Attributes:
        id: identifies the event. Copies of one notification carry the same id.
        rule: the rule.
        target: the agent, cache or pool; empty for a silence.
        before: the state before.
        after: the state after; for a silence, SILENCED at its start and OK at its end.
        at: the time of the evaluation, s since 1970.
        value: the value that was judged; None without data.
        low: the smallest possible exact value.
        high: the largest possible exact value.
        interval: the time range that the value covers.
        reason: a sentence for people.
    """

    id: str
    rule: str
    target: str
    before: AlertState
    after: AlertState
    at: float
    value: float | None
    low: float | None
    high: float | None
    interval: Interval
    reason: str

    def packed(self) -> dict[str, str]:
        """Return the fields as stored in the stream of events."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "interval"}
        found |= {"before": self.before.value, "after": self.after.value}
        found |= {"rule": encoded(self.rule), "target": encoded(self.target)}
        found |= {"start": self.interval.start, "end": self.interval.end}
        return {name: "-" if value is None else str(value) for name, value in found.items()}

    @classmethod
    def unpacked(cls, stored: Mapping[str, str]) -> AlertEvent:
        """Read the fields of a stored event.

        Raises:
            KeyError: a field is missing.
            ValueError: a field has a value that this library does not write.
        """
        return cls(
            stored["id"],
            decoded(stored["rule"]),
            decoded(stored["target"]),
            AlertState(stored["before"]),
            AlertState(stored["after"]),
            _finite(stored["at"]),
            _maybe(stored["value"]),
            _maybe(stored["low"]),
            _maybe(stored["high"]),
            Interval(_finite(stored["start"]), _finite(stored["end"])),
            stored["reason"],
        )


def _maybe(text: str) -> float | None:
    return None if text == "-" else _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or len(text) > _MAX_CHARACTERS:
        raise ValueError(text)
    return number


_MAX_CHARACTERS = 30


@dataclass(frozen=True, slots=True)
class AlertStatus:
    """The present state of a rule for one target.

    Attributes:
        rule: the rule.
        target: the agent, cache or pool.
        scope: the kind of the target: "agents", "cache" or "pool".
        severity: severity of the rule.
        state: the state; SILENCED if the alert fires during a silence.
        since: when the state began, s since 1970.
        value: the last value; None without data.
        low: the smallest possible exact value.
        high: the largest possible exact value.
        judged_at: time of the last evaluation, s since 1970.
        when: the condition of the rule.
        silenced_until: end of the rule's silence, s since 1970; None without a silence.
    """

    rule: str
    target: str
    scope: str
    severity: str
    state: AlertState
    since: float
    value: float | None
    low: float | None
    high: float | None
    judged_at: float
    when: str
    silenced_until: float | None


@dataclass(frozen=True, slots=True)
class RuleStatus:
    """A deployed rule.

    Attributes:
        name: name of the rule.
        severity: its severity.
        when: its condition.
        scope: "agents", "cache" or "pool".
        pattern: the glob of the targets' names.
        window: the window, s.
        judged_at: time of the last evaluation, s since 1970; None before the first one.
        silenced_until: end of its silence, s since 1970; None without one.
        targets: number of targets with a state.
    """

    name: str
    severity: str
    when: str
    scope: str
    pattern: str
    window: float
    judged_at: float | None
    silenced_until: float | None
    targets: int


@dataclass(frozen=True, slots=True)
class ReceiverStatus:
    """A receiver of notifications.

    Attributes:
        name: for example ``ops/0``: the first address of the receiver ``ops``.
        address: its address, without secrets.
        waiting: notifications that are not delivered yet.
        attempts: failed attempts since the last delivery.
        error: why the last attempt failed; None if it did not.
        failed_at: time of the last failed attempt, s since 1970; None if the last attempt succeeded.
        dropped: notifications that were dropped: too many waited, or one waited for more than a day.
    """

    name: str
    address: str
    waiting: int
    attempts: int
    error: str | None
    failed_at: float | None
    dropped: int


@dataclass(frozen=True, slots=True)
class Overview:
    """All alerts of a namespace.

    Attributes:
        deployment: number of the deployment; 0 before the first one.
        deployed_at: time of the deployment, s since 1970; None before the first one.
        alerts: the state of each rule for each target. Firing alerts come first, then pending alerts.
        rules: the rules, by name.
        receivers: the receivers, by name.
    """

    deployment: int
    deployed_at: float | None
    alerts: tuple[AlertStatus, ...]
    rules: tuple[RuleStatus, ...]
    receivers: tuple[ReceiverStatus, ...]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of one round of evaluation.

    Attributes:
        rules: names of the rules that this call evaluated.
        events: the transitions.
        next_after: seconds until the next rule is due.
    """

    rules: tuple[str, ...]
    events: tuple[AlertEvent, ...]
    next_after: float


@dataclass(frozen=True, slots=True)
class Firing:
    """A firing that a rule had, or would have had, in the past.

    Attributes:
        rule: the rule.
        target: the agent, cache or pool.
        severity: severity of the rule.
        start: when it fired, s since 1970.
        end: when it was resolved, s since 1970; None if it fires until the end of the replay.
        value: the value at the start.
    """

    rule: str
    target: str
    severity: str
    start: float
    end: float | None
    value: float | None


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a replay of rules over the past.

    Attributes:
        firings: in the order of their starts.
        interval: the time range that was replayed.
        coarse: a sentence for each rule that was judged on wider slices than the live evaluation uses. This happens in
            the early part of the time range, for which the server no longer keeps narrow slices.
        judged: number of judgements.
    """

    firings: tuple[Firing, ...]
    interval: Interval
    coarse: tuple[str, ...]
    judged: int


def plain(value: Any) -> Any:
    """Return a result as data for JSON: dicts, lists, texts and numbers."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    return value
