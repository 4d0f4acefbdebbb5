"""Replays rules over the past, and finds when each rule would have fired, and for how long.

The rows of `metrics.series` are added up over a sliding window. The sums are judged by the code of the live evaluation,
at the times at which a live evaluation takes place. For each agent, a window is added up once for all rules that use
the window. The reason is speed: a hundred rules on a hundred agents over a day are 14 million judgements. Rules on
caches and pools are judged on the sampled histories of these caches and pools.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from agentperf_redis.alerts.commands import DELAY_MS
from agentperf_redis.alerts.evaluation import BurnCounts, Verdict, burn_verdict, judge, threshold_verdict
from agentperf_redis.alerts.expression import Scope, share_of
from agentperf_redis.alerts.flows import AlertService, checked_rules, matching
from agentperf_redis.alerts.model import AlertState, Firing, Measured, Replay, TargetState
from agentperf_redis.alerts.rules import Rule, RuleSet
from agentperf_redis.alerts.sampled import histories, judged_slices, slices_of
from agentperf_redis.alerts.values import Judged, Totals, bucket_value, burn_counts, measured_agent
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics import commands as metrics_commands
from agentperf_redis.metrics import flows as metrics_flows
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.histogram import rank
from agentperf_redis.metrics.model import Interval
from agentperf_redis.metrics.series import SeriesRow, series
from agentperf_redis.windows import Timestamp, timestamp_ms, window_seconds

_WIDTHS_MS = (10_000, 60_000, 3_600_000, 86_400_000)
_STEPS_AT_ONCE = 1500
_ROWS_AT_ONCE = 4000
"""Max rows that are read at once. The server takes some 20 us for each."""
_MAX_SINCE_S = 30 * 86_400.0


def replay(
    service: AlertService,
    path: str | os.PathLike[str] | None,
    text: str | None,
    since: str | float,
    as_of: Timestamp,
) -> Flow[Replay]:
    """Replay the rules of a file over the past. The arguments are checked at the call, before the flow runs."""
    length = window_seconds(since, "since")
    if not 60.0 <= length <= _MAX_SINCE_S:  # noqa: PLR2004  60 s: most rules are evaluated once a minute
        raise InvalidArgument("since", since, "a time from '1m' to '30d'")
    rules = checked_rules(path, text)
    return _replay(service, rules, round(length * 1000), None if as_of is None else timestamp_ms("as_of", as_of))


def _replay(service: AlertService, rules: RuleSet, since_ms: int, as_of_ms: int | None) -> Flow[Replay]:
    names = yield from metrics_flows.agent_names(service.flusher)
    read = yield from metrics_commands.read(service.backend.namespace, 0, (), window_ms=0, as_of_ms=-1, max_exact=-1)
    asked_ms = min(read.now_ms, as_of_ms) if as_of_ms is not None else read.now_ms - DELAY_MS
    end_ms = min(read.now_ms - DELAY_MS, asked_ms)
    start_ms = asked_ms - since_ms
    firings: list[Firing] = []
    coarse: dict[str, int] = {}
    judged = 0
    for scope in (Scope.CACHE, Scope.POOL):
        sampled_rules = [rule for rule in rules.rules if rule.scope is scope]
        sampled = (yield from histories(service.backend, scope)) if sampled_rules else []
        for rule in sampled_rules:
            for name, target, history in sampled:
                if rule.matches(name):
                    every_ms = rule.every * 1000
                    first_ms = start_ms - start_ms % every_ms - round(rule.window * 1000)
                    slices = slices_of(history, first_ms, end_ms, every_ms)
                    verdicts = judged_slices(rule, slices, start_ms, end_ms)
                    firings += _firings(rule, target, verdicts)
                    judged += len(verdicts)
                    wide = [of.end_ms for of in slices if of.end_ms - of.begin_ms > every_ms and of.end_ms > start_ms]
                    coarse[rule.name] = max([coarse.get(rule.name, 0), *wide])
    by_every: dict[int, list[Rule]] = {}
    for rule in rules.rules:
        if rule.scope is Scope.AGENTS:
            by_every.setdefault(rule.every, []).append(rule)
    for every, group in by_every.items():
        targets = {rule.name: set(matching(rule, names)) for rule in group}
        wanted = sorted(set().union(*targets.values()))
        every_ms = every * 1000
        first_ms = start_ms - round(max(rule.window for rule in group) * 1000)
        first_ms -= first_ms % every_ms
        last_ms = end_ms - end_ms % every_ms
        at_once = max(1, _ROWS_AT_ONCE * every_ms // max(every_ms, last_ms - first_ms))
        for begin in range(0, len(wanted), at_once):
            part = wanted[begin : begin + at_once]
            by_agent = yield from _rows(service.flusher, part, first_ms, last_ms, every_ms)
            for agent, rows in by_agent.items():
                of_agent = _History(rows, every_ms, start_ms, last_ms)
                for rule in group:
                    if agent in targets[rule.name]:
                        firings += _firings(rule, agent, _Judgements(rule, of_agent))
                        judged += len(of_agent.times)
                        coarse[rule.name] = max(coarse.get(rule.name, 0), of_agent.coarse_until_ms)
    return Replay(
        tuple(sorted(firings, key=lambda each: (each.start, each.rule, each.target))),
        Interval(start_ms / 1000, end_ms / 1000),
        tuple(
            f"{name}: until {_time(until_ms)} UTC, only slices wider than the interval of evaluation are left"
            for name, until_ms in sorted(coarse.items())
            if until_ms
        ),
        judged,
    )


def _time(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(ms / 1000))


def _rows(
    flusher: Flusher, agents: Sequence[str], first_ms: int, last_ms: int, step_ms: int
) -> Flow[dict[str, list[SeriesRow]]]:
    """Read the narrowest rows of a time range that the server keeps, but none narrower than `step_ms`."""
    found: dict[str, list[SeriesRow]] = {agent: [] for agent in agents}
    waiting = [(first_ms, last_ms, step_ms)]  # unread time ranges, the latest first, so that `pop` returns the earliest
    while waiting:
        begin, end, step = waiting.pop()
        if end - begin > _STEPS_AT_ONCE * step:
            middle = begin + _STEPS_AT_ONCE * step
            waiting += [(middle, end, step), (begin, middle, step)]
            continue
        begin -= begin % step
        try:
            part = yield from series(flusher, agents, window=(end - begin) / 1000, step=step / 1000, as_of=end / 1000)
        except InvalidArgument as error:
            if error.argument != "step" or step == _WIDTHS_MS[-1]:
                raise
            wider = next(width for width in _WIDTHS_MS if width > step)
            middle = max((begin + end) // 2 // wider, begin // wider + 1) * wider
            if middle < end:  # read the range in two parts: the later part may still have narrow slices
                waiting += [(middle, end, step), (begin, middle, step)]
            else:
                waiting.append((begin, -(-end // wider) * wider, wider))
            continue
        for agent, rows in part.items() if isinstance(part, dict) else ():
            known = found[agent]
            # A row of wider slices may begin before the previous row ends. Such a row is left out.
            known += [row for row in rows if not known or row.interval.start >= known[-1].interval.end - 0.001]
    return found


class _History:
    """The rows of one agent, and their sums over each window at each time of evaluation.

    Args:
        rows: contiguous rows, the earliest first.
        every_ms: interval of evaluation, ms.
        start_ms: all times of evaluation are later than this, ms since 1970.
        end_ms: no time of evaluation is later than this, ms since 1970.
    """

    def __init__(self, rows: Sequence[SeriesRow], every_ms: int, start_ms: int, end_ms: int) -> None:
        self._rows = rows
        self._windows: dict[float, _Sums] = {}
        starts = [round(row.interval.start * 1000) for row in rows]
        ends = [*starts[1:], end_ms]
        self._bounds = list(zip(starts, ends, strict=True))
        self.coarse_until_ms = 0
        self.times: list[int] = []
        for begin, end in self._bounds:
            if start_ms < end <= end_ms:
                self.times.append(end)
                if end - begin > every_ms:
                    self.coarse_until_ms = end

    def sums(self, window: float) -> _Sums:
        """Return the sums over a window at each time."""
        if window not in self._windows:
            self._windows[window] = _Sums(self._rows, self._bounds, self.times, round(window * 1000))
        return self._windows[window]


class _Sums:
    """The sums over a window, as lists with one item for each time of evaluation."""

    def __init__(
        self, rows: Sequence[SeriesRow], bounds: Sequence[tuple[int, int]], times: Sequence[int], window_ms: int
    ) -> None:
        self.totals = list(_slid(rows, bounds, times, window_ms))
        self.tasks = [of.tasks for of in self.totals]
        self.fewest = min(self.tasks, default=0)
        self._values: dict[str, list[float] | list[int]] = {}
        self._passed: list[tuple[list[int], list[int]]] = []

    def values(self, measure: str) -> list[float] | list[int]:
        """Return the value of a measure at each time. For a percentile, it is the bucket, or `_ZEROS` for 0 us."""
        if measure not in self._values:
            share = share_of(measure)
            if share:
                self._values[measure] = [
                    indexes[at - 1] if passed[-1] and (at := bisect_right(passed, rank(passed[-1], share))) else _ZEROS
                    for indexes, passed in self._histograms()
                ]
            else:
                self._values[measure] = [measured_agent(measure, of).value for of in self.totals]
        return self._values[measure]

    def _histograms(self) -> list[tuple[list[int], list[int]]]:
        """Return for each time the rising bucket indexes, and the sample counts up to 0 us and up to each bucket."""
        if not self._passed:
            last: Totals | None = None
            for of in self.totals:
                if last is not None and of.buckets is last.buckets:
                    self._passed.append(self._passed[-1])
                else:
                    indexes = sorted(of.buckets)
                    passed = list(accumulate((of.buckets[index] for index in indexes), initial=of.zeros))
                    self._passed.append((indexes, passed))
                last = of
        return self._passed


_ZEROS = -(10**6)
"""Stands for the bucket of durations of 0 us, which has no index."""


def _slid(
    rows: Sequence[SeriesRow], bounds: Sequence[tuple[int, int]], times: Sequence[int], window_ms: int
) -> Iterator[Totals]:
    """Yield the totals of the rows in the window that ends at each time."""
    tasks = errors = cancelled = sum_us = tokens = cost_nano = zeros = 0
    buckets: dict[int, int] = {}
    longest: deque[tuple[int, float]] = deque()  # (index of a row, its longest duration), by descending duration
    first = after = 0
    changed = True
    last: Totals | None = None
    for at in times:
        while after < len(rows) and bounds[after][1] <= at:
            row = rows[after]
            if row.tasks or row.tokens or row.cost:
                changed = True
                tasks += row.tasks
                errors += row.errors
                cancelled += row.cancelled
                sum_us += round(row.total_time * 1e6)
                tokens += row.tokens
                cost_nano += round(row.cost * 1e9)
                zeros += row.zeros
                for index, count in row.buckets.items():
                    buckets[index] = buckets.get(index, 0) + count
                while longest and longest[-1][1] <= row.max:
                    longest.pop()
                longest.append((after, row.max))
            after += 1
        while first < after and bounds[first][1] <= at - window_ms:
            row = rows[first]
            if row.tasks or row.tokens or row.cost:
                changed = True
                tasks -= row.tasks
                errors -= row.errors
                cancelled -= row.cancelled
                sum_us -= round(row.total_time * 1e6)
                tokens -= row.tokens
                cost_nano -= round(row.cost * 1e9)
                zeros -= row.zeros
                for index, count in row.buckets.items():
                    left = buckets[index] - count
                    if left:
                        buckets[index] = left
                    else:
                        del buckets[index]
                if longest and longest[0][0] == first:
                    longest.popleft()
            first += 1
        begin = bounds[first][0] if first < after else at - window_ms
        interval = Interval(min(begin, at) / 1000, at / 1000)
        if changed or last is None:
            last = Totals(
                tasks,
                errors,
                cancelled,
                sum_us,
                longest[0][1] if longest else 0.0,
                tokens,
                cost_nano / 1e9,
                dict(buckets),
                zeros,
                interval,
            )
            changed = False
        else:
            last = Totals(
                last.tasks,
                last.errors,
                last.cancelled,
                last.sum_us,
                last.max_s,
                last.tokens,
                last.cost,
                last.buckets,
                last.zeros,
                interval,
            )
        yield last


_OK, _FIRING, _NO_DATA = AlertState.OK, AlertState.FIRING, AlertState.NO_DATA
_NEVER = frozenset[Verdict]()
_QUIET = {
    _OK: frozenset({Verdict.CLEAR, Verdict.BETWEEN, Verdict.UNDECIDED}),
    _FIRING: frozenset({Verdict.HOLDS, Verdict.BETWEEN, Verdict.UNDECIDED}),
    _NO_DATA: frozenset({Verdict.UNDECIDED}),
}
"""For each state, the verdicts that leave it unchanged while no timer runs."""


class _Judgements:
    """The verdicts of a rule on one agent, and the values shown to people. Values are computed only for firings.

    Args:
        rule: the rule.
        history: the rows of the agent.
    """

    def __init__(self, rule: Rule, history: _History) -> None:
        self._rule = rule
        self._history = history

    def __iter__(self) -> Iterator[tuple[int, tuple[Verdict, None]]]:
        verdicts = _verdicts(self._rule, self._history)
        return ((at_ms, (found, None)) for at_ms, found in zip(self._history.times, verdicts, strict=True))

    def value(self, at: int) -> float | None:
        """Return the value of the rule's measure at the time of evaluation with index `at`."""
        measured = _measured(self._rule, self._history, at)
        return None if measured is None else measured.value


def _firings(rule: Rule, target: str, judged: Sequence[tuple[int, Judged]] | _Judgements) -> list[Firing]:
    """Return the firings that follow from the verdicts on one target."""
    found: list[Firing] = []
    state: TargetState | None = None
    before_ms = 0
    silent_keep = rule.no_data == "keep"
    for at, (at_ms, (verdict, measured)) in enumerate(judged):
        # Most judgements change nothing but the time of the last evaluation. For speed, skip such judgements.
        now = _OK if state is None else state.state
        if state is None or not state.timer_ms:
            quiet = _QUIET.get(now, _NEVER)
            if verdict in quiet or (verdict is Verdict.NO_DATA and silent_keep and now is not _OK):
                before_ms = at_ms
                continue
        before = replace(state, seen_ms=before_ms) if state is not None and before_ms else state
        if before is None and before_ms:
            before = TargetState(since_ms=before_ms, seen_ms=before_ms, data_ms=before_ms)
        # `judge` counts time as unobserved if evaluations are much further apart than `interval_ms`. A replay misses no
        # evaluation. But where the server keeps only wide slices, the evaluations of the replay are further apart than
        # the rule's interval. So here, `interval_ms` is the time since the previous evaluation.
        state = judge(rule, before, verdict, None, at_ms, interval_ms=max(1, at_ms - before_ms)).state
        before_ms = at_ms
        if state.state is _FIRING and now is not _FIRING:
            value = judged.value(at) if isinstance(judged, _Judgements) else measured.value if measured else None
            found.append(Firing(rule.name, target, rule.severity, at_ms / 1000, None, value))
        elif now is _FIRING and state.state is not _FIRING:
            found[-1] = replace(found[-1], end=at_ms / 1000)
    return found


def _verdicts(rule: Rule, history: _History) -> Iterable[Verdict]:
    """Return the verdict of a rule at each time."""
    if rule.objective is not None:
        return _burn_verdicts(rule, history)
    return _threshold_verdicts(rule, history)


def _burn_verdicts(rule: Rule, history: _History) -> Iterator[Verdict]:
    sums = [(window, history.sums(window).totals) for window in rule.windows]
    for at in range(len(history.times)):
        yield burn_verdict(rule, _counts(rule, sums, at))[0]


def _counts(rule: Rule, sums: Sequence[tuple[float, Sequence[Totals]]], at: int) -> dict[float, BurnCounts]:
    return {window: burn_counts(rule, totals[at]) for window, totals in sums}


def _threshold_verdicts(rule: Rule, history: _History) -> list[Verdict]:
    assert rule.when is not None  # noqa: S101  a rule without an objective has a condition
    sums = history.sums(rule.window)
    is_percentile = share_of(rule.when.measure) > 0
    values = sums.values(rule.when.measure)
    known: dict[float, Verdict] = {}
    for value in set(values):
        low = high = float(value)
        if is_percentile:
            _, low, high = bucket_value(None if value == _ZEROS else int(value))
        known[value] = threshold_verdict(rule, low, high)
    if sums.fewest >= max(rule.min_events, 0 if rule.zero_is_data else 1):
        return [known[value] for value in values]
    none = Verdict.UNDECIDED if rule.zero_is_data else Verdict.NO_DATA
    found = []
    for tasks, value in zip(sums.tasks, values, strict=True):
        if tasks >= rule.min_events and (tasks or rule.zero_is_data):
            found.append(known[value])
        else:
            found.append(Verdict.UNDECIDED if tasks else none)
    return found


def _measured(rule: Rule, history: _History, at: int) -> Measured | None:
    """Return the value to show for a firing that starts at the time with index `at`."""
    if rule.objective is None:
        assert rule.when is not None  # noqa: S101  as above
        return measured_agent(rule.when.measure, history.sums(rule.window).totals[at])
    sums = [(window, history.sums(window).totals) for window in rule.windows]
    _, value, low, high = burn_verdict(rule, _counts(rule, sums, at))
    totals = history.sums(rule.window).totals[at]
    return None if math.isnan(value) else Measured(value, low, high, totals.tasks, totals.interval)
