"""Judges rules on caches and pools at past times, from the sampled histories of the caches and pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from agentperf_redis.alerts.evaluation import Verdict, verdict
from agentperf_redis.alerts.expression import Scope
from agentperf_redis.alerts.model import Measured
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.targets import cache_target
from agentperf_redis.alerts.values import Judged, PoolFigures, pool_value
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.history import read_pool
from agentperf_redis.balancer.layouts import layouts_of
from agentperf_redis.cache.history import history_of
from agentperf_redis.cache.model import KINDS
from agentperf_redis.cache.operator import keys_of
from agentperf_redis.command import Flow
from agentperf_redis.history import History
from agentperf_redis.metrics.model import Interval

_RINGS = ((10_000, 90), (60_000, 180), (3_600_000, 192))
"""Width in ms and number of slices of each ring of a history, the narrowest slices first; as in
lua/includes/history.lua."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of a history, with its range in ms since 1970. The figures are None if no process took a sample in it."""

    begin_ms: int
    end_ms: int
    figures: Mapping[str, int] | None


def histories(backend: Backend, scope: Scope) -> Flow[list[tuple[str, str, History]]]:
    """Read the histories of all caches or pools. Each item is a name, the name as a target, and the history."""
    found = []
    for service in ("lb",) if scope is Scope.POOL else ("cache", "tiered"):
        for name in (yield from backend.entered(service)):
            if scope is Scope.POOL:
                pool = Pool.of(backend.namespace, name)
                target, history = name, (yield from read_pool(layouts_of(backend), pool))
            else:
                shards = yield from keys_of(backend, service, name)
                target, history = cache_target(KINDS[service], name), (yield from history_of(shards))
            found.append((name, target, history))
    return found


def slices_of(history: History, first_ms: int, last_ms: int, every_ms: int) -> list[Slice]:
    """Return the narrowest slices of a time range that the server keeps, but none narrower than `every_ms`."""
    found = []
    at = first_ms
    while at < last_ms:
        kept = [width for width, slots in _RINGS if width >= every_ms and at + width * slots > history.now_ms]
        width = kept[0] if kept else _RINGS[-1][0]
        begin = at - at % width
        found.append(Slice(begin, begin + width, history.slices.get((width, begin))))
        at = begin + width
    return found


def judged_slices(rule: Rule, slices: Sequence[Slice], start_ms: int, end_ms: int) -> list[tuple[int, Judged]]:
    """Judge a rule at the end of each slice in a time range, by the code of the live evaluation."""
    found = []
    first = 0
    for at, each in enumerate(slices):
        if not start_ms < each.end_ms <= end_ms:
            continue
        while first < at and slices[first].end_ms <= each.end_ms - rule.window * 1000:
            first += 1
        sampled = [
            of.figures for of in slices[first : at + 1] if of.figures is not None and _is_whole(rule, of.figures)
        ]
        measured = _measured(rule, sampled, slices[first].begin_ms, each.end_ms) if sampled else None
        found.append((each.end_ms, (verdict(rule, measured) if measured else Verdict.NO_DATA, measured)))
    return found


def _is_whole(rule: Rule, figures: Mapping[str, int]) -> bool:
    """Whether a sample has all figures. Earlier versions did not sample the capacity of a pool, which is never 0."""
    return rule.scope is not Scope.POOL or figures.get("last_capacity", 0) > 0


def _measured(rule: Rule, sampled: Sequence[Mapping[str, int]], begin_ms: int, end_ms: int) -> Measured:
    assert rule.when is not None  # noqa: S101  a rule without an objective has a condition
    measure, events = rule.when.measure, -1
    last = sampled[-1]
    if measure == "hit_rate":
        hits, misses = (sum(of.get(name, 0) for of in sampled) for name in ("hits", "misses"))
        events = hits + misses
        value = hits / events if events else 0.0
    elif measure == "evictions":
        value = float(sum(of.get("evictions", 0) for of in sampled))
    elif rule.scope is Scope.POOL:
        figures = (last.get(f"last_{each.name}", 0) for each in fields(PoolFigures))
        value = pool_value(rule.when, PoolFigures(*figures))
    else:
        value = float(last.get(measure, 0))
    return Measured(value, value, value, events, Interval(begin_ms / 1000, end_ms / 1000))
