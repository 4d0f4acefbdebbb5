"""Checked rules of alerts, and the addresses that their notifications go to."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from agentperf_redis.alerts.expression import Condition, Scope, measure_of

SHORT_WINDOW_S = 300.0
EVERY_SHORT_S, EVERY_S = 10, 60
"""Seconds between two evaluations of a rule. The first value is for windows below five minutes and for pools, the
second one for all other rules. The values are the widths of the two narrowest kinds of metrics slices. So the window of
an evaluation consists of whole slices."""


@dataclass(frozen=True, slots=True)
class Burn:
    """One pair of windows of a burn-rate rule.

    Attributes:
        factor: the rule fires if the burn rate is above this in both windows.
        long_s: the long window, s.
        short_s: the short window, s. Because of it, the alert ends soon after the failures end.
    """

    factor: float
    long_s: float
    short_s: float


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective of an SLO.

    Attributes:
        share: the share of executions that must be good, such as 0.99.
        under_s: good executions take at most this long, s; None: good executions are those that do not fail.
    """

    share: float
    under_s: float | None

    @property
    def budget(self) -> float:
        """The share of executions that may be bad."""
        return 1.0 - self.share


@dataclass(frozen=True)
class Rule:
    """A checked rule. Durations are in seconds.

    Attributes:
        name: unique name of the rule.
        scope: the kind of objects that it watches.
        pattern: a glob of their names.
        when: the condition; None for a burn-rate rule.
        resolve: the condition that ends the alert; None: the negation of `when`.
        window: length of the window; for a burn-rate rule, of its longest window.
        hold: how long the condition must hold before the alert fires.
        keep_firing: how long the condition must be false before the alert is resolved.
        min_events: with fewer executions in the window, nothing is decided.
        no_data: "keep", "ok" or "alert".
        severity: a word for the receivers.
        notify: names of receivers.
        renotify: time between two notifications of one alert; None: one notification.
        objective: the objective of a burn-rate rule.
        burns: the pairs of windows of a burn-rate rule.
        text: the condition, as shown to people.
    """

    name: str
    scope: Scope
    pattern: str
    when: Condition | None
    resolve: Condition | None
    window: float
    hold: float
    keep_firing: float
    min_events: int
    no_data: str
    severity: str
    notify: tuple[str, ...]
    renotify: float | None
    objective: Objective | None
    burns: tuple[Burn, ...]
    text: str

    @cached_property
    def every(self) -> int:
        """Seconds between two evaluations."""
        return EVERY_SHORT_S if self.scope is Scope.POOL or self.window < SHORT_WINDOW_S else EVERY_S

    @cached_property
    def windows(self) -> tuple[float, ...]:
        """The windows that an evaluation reads, s."""
        found = {window for burn in self.burns for window in (burn.long_s, burn.short_s)}
        return tuple(sorted(found)) if found else (self.window,)

    @property
    def measure(self) -> str:
        """The name of the measure; ``burn rate`` for a burn-rate rule."""
        return self.when.measure if self.when is not None else "burn rate"

    @property
    def zero_is_data(self) -> bool:
        """Whether the measure has a value in a window without executions: true of `tasks`, false of `p95`."""
        found = measure_of(self.when.measure) if self.when is not None else None
        return found is not None and found.is_count

    def matches(self, name: str) -> bool:
        """Return whether the rule watches the object of this name."""
        return name == self.pattern or fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a receiver: a URL for apprise, or a command.

    Attributes:
        name: ``ops/0`` for the first URL of the receiver ``ops``, ``ops/command`` for its command.
        url: the URL, with its secrets; empty for a command.
        command: the words of the command; empty for a URL.
    """

    name: str
    url: str = ""
    command: tuple[str, ...] = ()

    @property
    def masked(self) -> str:
        """The address without anything that may be a secret: ``slack://…``, ``/usr/local/bin/page …``."""
        return masked(self.url) if self.url else self.command[0] + (" …" if len(self.command) > 1 else "")


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A checked rules file.

    Attributes:
        rules: the rules; an SLO is two rules.
        addresses: the addresses of all receivers, by the receiver's name.
        stored: the fields of the hash that holds the rules on the server.
    """

    rules: tuple[Rule, ...]
    addresses: Mapping[str, tuple[Address, ...]]
    stored: Mapping[str, str]


def masked(url: str) -> str:
    """Return a URL without anything that may be a secret. In many services, the host part is a token."""
    scheme, separator, _ = url.partition("://")
    return f"{scheme}://…" if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else "…"
