"""Conditions of rules, such as ``p95 > 2s`` or ``failure_rate >= 5%``: their syntax and their truth.

A measured value is an interval from `low` to `high`, because a percentile is known only within the error bound of the
histogram. A condition holds if it holds for the whole interval, and is undecided if it holds for only a part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from agentperf_redis.errors import InvalidArgument


class Scope(Enum):
    """The kind of objects that a rule watches. Each value is also the name of a field in the rules file."""

    AGENTS = "agents"
    CACHE = "cache"
    POOL = "pool"


class Unit(Enum):
    """The unit of a measure."""

    SECONDS = "seconds"
    SHARE = "share"
    COUNT = "count"
    BYTES = "bytes"
    PER_SECOND = "per second"


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that a condition can name.

    Attributes:
        scope: the kind of objects that have this figure.
        unit: its unit.
        is_count: whether the figure has a value when there were no executions. A number of tasks then has a value; an
            average, a percentile or a share has none.
    """

    scope: Scope
    unit: Unit
    is_count: bool = False


_AGENTS, _CACHE, _POOL = Scope.AGENTS, Scope.CACHE, Scope.POOL
MEASURES = {
    "avg": Measure(_AGENTS, Unit.SECONDS),
    "max": Measure(_AGENTS, Unit.SECONDS),
    "failure_rate": Measure(_AGENTS, Unit.SHARE),
    "success_rate": Measure(_AGENTS, Unit.SHARE),
    "tasks": Measure(_AGENTS, Unit.COUNT, is_count=True),
    "errors": Measure(_AGENTS, Unit.COUNT, is_count=True),
    "throughput": Measure(_AGENTS, Unit.PER_SECOND, is_count=True),
    "tokens": Measure(_AGENTS, Unit.COUNT, is_count=True),
    "cost": Measure(_AGENTS, Unit.COUNT, is_count=True),
    "hit_rate": Measure(_CACHE, Unit.SHARE),
    "size": Measure(_CACHE, Unit.COUNT, is_count=True),
    "bytes": Measure(_CACHE, Unit.BYTES, is_count=True),
    "evictions": Measure(_CACHE, Unit.COUNT, is_count=True),
    "load": Measure(_POOL, Unit.COUNT, is_count=True),
    "healthy": Measure(_POOL, Unit.COUNT, is_count=True),
    "unhealthy": Measure(_POOL, Unit.COUNT, is_count=True),
    "waiters": Measure(_POOL, Unit.COUNT, is_count=True),
    "overdue": Measure(_POOL, Unit.COUNT, is_count=True),
}
"""The measures by name. Percentiles of agents, such as p95 or p99.9, are measures too: see `measure_of`."""

_SYNONYMS = {"unfit": "unhealthy"}
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)")
_CONDITION = re.compile(r"\s*([a-z_]+|p[\d.]+)\s*(>=|<=|>|<)\s*([\d.]+)\s*([A-Za-z%/]*)\s*")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"": 1.0, "B": 1.0} | {
    name: factor
    for power, letter in enumerate("KMG", 1)
    for name, factor in ((f"{letter}B", 1000.0**power), (f"{letter}iB", 1024.0**power))
}
_PER_SECOND = {"": 1.0, "/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600}
_COUNT = {"": 1.0, "k": 1e3, "M": 1e6}
_THRESHOLDS = {
    Unit.SECONDS: (_SECONDS, "a duration such as 2s or 250ms, with its unit: us, ms, s, m or h"),
    Unit.SHARE: ({"": 1.0, "%": 0.01}, "a share such as 5% or 0.05, at most 100%"),
    Unit.COUNT: (_COUNT, "a number such as 20, 5k or 2M"),
    Unit.BYTES: (_BYTES, "bytes such as 500MB or 2GiB"),
    Unit.PER_SECOND: (_PER_SECOND, "a rate such as 5/s, 30/min or 100/h"),
}


def measure_of(name: str) -> Measure | None:
    """Return the measure with this name, or None if no measure has this name."""
    if _PERCENTILE.fullmatch(name):
        return Measure(Scope.AGENTS, Unit.SECONDS) if share_of(name) > 0 else None
    return MEASURES.get(name)


def share_of(name: str) -> float:
    """Return the share of a percentile, such as 0.95 for ``p95``. Returns 0.0 if the measure is not a percentile."""
    found = _PERCENTILE.fullmatch(name)
    return float(found[1]) / 100 if found else 0.0


class Truth(Enum):
    """Whether a condition holds for a measured value."""

    TRUE = "true"
    FALSE = "false"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a measure with a threshold.

    Attributes:
        measure: the name of the measure.
        sign: ``>``, ``>=``, ``<`` or ``<=``.
        threshold: in the unit of the measure: seconds, a share from 0 to 1, a number, bytes, or executions per second.
        is_relative: whether `load` is compared as a share of the pool's capacity.
        text: the condition as written.
    """

    measure: str
    sign: str
    threshold: float
    is_relative: bool
    text: str

    @property
    def is_upper(self) -> bool:
        """Whether large values fulfil the condition."""
        return self.sign.startswith(">")

    def truth(self, low: float, high: float) -> Truth:
        """Return whether the condition holds for a value between `low` and `high`."""
        first, last = self.holds(low), self.holds(high)
        if first != last:
            return Truth.UNDECIDED
        return Truth.TRUE if first else Truth.FALSE

    def holds(self, value: float) -> bool:
        """Return whether the condition holds for an exact value."""
        if self.sign == ">":
            return value > self.threshold
        if self.sign == ">=":
            return value >= self.threshold
        if self.sign == "<":
            return value < self.threshold
        return value <= self.threshold


def parsed(argument: str, text: object, scope: Scope) -> Condition:
    """Check a condition.

    Args:
        argument: name of the argument, for errors.
        text: the condition.
        scope: the kind of objects that the rule watches.

    Raises:
        InvalidArgument: the syntax, measure, unit or threshold is invalid, or no value can fulfil the condition.
    """
    found = _CONDITION.fullmatch(text) if isinstance(text, str) else None
    if found is None or not isinstance(text, str):
        example = {Scope.AGENTS: "p95 > 2s", Scope.CACHE: "hit_rate < 80%", Scope.POOL: "waiters > 10"}[scope]
        raise InvalidArgument(argument, text, f"a measure, one of > >= < <=, and a threshold, such as {example!r}")
    name, sign, digits, suffix = found.groups()
    name = _SYNONYMS.get(name, name)
    measure = measure_of(name)
    if measure is None or measure.scope is not scope:
        names = [each for each, of in MEASURES.items() if of.scope is scope]
        percentiles = ["p50", "p90", "p95", "p99", "p99.9"] if scope is Scope.AGENTS else []
        raise InvalidArgument(argument, text, f"a measure of {scope.value}: {', '.join([*percentiles, *names])}")
    is_relative = name == "load" and suffix == "%"
    factors, allowed = _THRESHOLDS[Unit.SHARE if is_relative else measure.unit]
    try:
        threshold = float(digits) * factors[suffix]
    except (KeyError, ValueError):
        raise InvalidArgument(argument, text, f"for {name}, {allowed}") from None
    made = Condition(name, sign, threshold, is_relative, " ".join(text.split()))
    top = 1.0 if measure.unit is Unit.SHARE or is_relative else 1e15
    if threshold > top:
        raise InvalidArgument(argument, text, f"for {name}, {allowed}")
    if not (made.holds(0.0) or made.holds(top)):
        raise InvalidArgument(argument, text, "a condition that some value can fulfil")
    if made.holds(0.0) and made.holds(top):
        raise InvalidArgument(argument, text, "a condition that not every value fulfils")
    return made


def resolving(argument: str, text: object, when: Condition, scope: Scope) -> Condition:
    """Check the condition that ends an alert. It names the same measure, and never holds together with `when`.

    Raises:
        InvalidArgument: as `parsed`, and for a condition that overlaps `when`.
    """
    made = parsed(argument, text, scope)
    apart = made.threshold <= when.threshold if when.is_upper else made.threshold >= when.threshold
    if (
        made.measure != when.measure
        or made.is_relative != when.is_relative
        or made.is_upper == when.is_upper
        or not apart
    ):
        side = "<" if when.is_upper else ">"
        limit = "most" if when.is_upper else "least"
        raise InvalidArgument(
            argument, text, f"{when.measure} {side} a threshold of at {limit} that of when, {when.text!r}"
        )
    if made.threshold == when.threshold and made.holds(made.threshold) and when.holds(when.threshold):
        raise InvalidArgument(argument, text, f"a condition that never holds together with when, {when.text!r}")
    return made


def value_text(measure: str, value: float, *, is_relative: bool = False) -> str:
    """Return a value with its unit, for people: ``2.31 s``, ``7.2%``, ``1200``."""
    found = measure_of(measure)
    unit = found.unit if found is not None else Unit.COUNT
    if unit is Unit.SHARE or is_relative:
        return f"{value:.4g}".removesuffix(".0") if value > 1 else f"{value:.2%}"
    if unit is Unit.SECONDS:
        return f"{value:.3f} s" if value >= 0.01 or value == 0 else f"{value * 1000:.3g} ms"  # noqa: PLR2004
    if unit is Unit.PER_SECOND:
        return f"{value:.4g}/s"
    return f"{value:.6g}"
