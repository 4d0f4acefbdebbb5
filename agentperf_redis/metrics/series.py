"""Metrics over time: one row for each step, for one agent or for several.

Rows and windows are read from the same time slices. So a row counts the same executions as a window of its time range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agentperf_redis import arguments, keys
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.errors import CorruptState, InvalidArgument
from agentperf_redis.metrics.closed_slices import add_closed
from agentperf_redis.metrics.flows import listed_names, own_records_counted
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, estimated_quantile, merged
from agentperf_redis.metrics.model import OTHER
from agentperf_redis.script import Script
from agentperf_redis.windows import MAX_STEPS, Interval, TimeRange, Timestamp, Window, asked_steps, step_too_narrow

SERIES = Script("metrics/series")

STEPS_AT_ONCE = 960
"""Maximum number of steps in one script call, for all its agents together. Only a single agent may have more. If each
step has one slice, such a call takes about 10 ms of server time. An example is an hour of 16 agents, in steps of a
minute."""


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """The metrics of an agent in one step.

    Attributes:
        interval: the step. The current step ends at the time of the read.
        tasks: executions that ended in the step, including failed and cancelled ones.
        errors: executions that failed.
        cancelled: executions that were cancelled.
        total_time: sum of the durations, s.
        min: shortest duration, s; 0.0 without executions.
        max: longest duration, s; 0.0 without executions.
        tokens_in: tokens sent to models.
        tokens_out: tokens received from models.
        cost: cost of the models, rounded to 10^-9.
        buckets: the histogram of the durations, see `agentperf_redis.metrics.histogram`.
        zeros: number of durations of 0 us.
        error_types: failures by type.
    """

    interval: Interval
    tasks: int = 0
    errors: int = 0
    cancelled: int = 0
    total_time: float = 0.0
    min: float = 0.0
    max: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    buckets: Mapping[int, int] = field(default_factory=dict)
    zeros: int = 0
    error_types: Mapping[str, int] = field(default_factory=dict)

    @property
    def avg(self) -> float:
        """Average duration, s; 0.0 without executions."""
        return self.total_time / self.tasks if self.tasks else 0.0

    @property
    def p50(self) -> float:
        """50th percentile of the durations, s, within `error_bound`; 0.0 without executions."""
        return self._quantile(0.5)

    @property
    def p95(self) -> float:
        """95th percentile of the durations, s, within `error_bound`; 0.0 without executions."""
        return self._quantile(0.95)

    @property
    def p99(self) -> float:
        """99th percentile of the durations, s, within `error_bound`; 0.0 without executions."""
        return self._quantile(0.99)

    @property
    def tokens(self) -> int:
        """Tokens sent to and received from models."""
        return self.tokens_in + self.tokens_out

    @property
    def error_bound(self) -> float:
        """Maximum error of a percentile, relative to the exact percentile: 0.0217, or 0.0 without executions."""
        return RELATIVE_ERROR if self.tasks else 0.0

    @property
    def failure_rate(self) -> float:
        """Share of executions that failed, 0 to 1; 0.0 without executions."""
        return self.errors / self.tasks if self.tasks else 0.0

    @property
    def throughput(self) -> float:
        """Executions per second."""
        return self.tasks / self.interval.seconds if self.interval.seconds else 0.0

    def quantile(self, share: float) -> float:
        """Return any quantile of the durations.

        Args:
            share: 0 to 1; 0.9 is the 90th percentile.

        Returns:
            Seconds, within `error_bound`; 0.0 without executions.

        Raises:
            InvalidArgument: for an invalid share, such as 95.
        """
        return self._quantile(arguments.amount("share", share, maximum=1.0))

    def _quantile(self, share: float) -> float:
        return estimated_quantile(self.buckets, self.zeros, share, minimum=self.min, maximum=self.max)


def merged_rows(rows: Iterable[SeriesRow]) -> SeriesRow:
    """Add up rows to one row. The rows may belong to several steps, to several agents, or both.

    Args:
        rows: at least one row.

    Returns:
        A row from the earliest start to the latest end.

    Raises:
        InvalidArgument: without a row.
    """
    parts = tuple(rows)
    if not parts:
        raise InvalidArgument("rows", parts, "at least one row")
    timed = [row for row in parts if row.tasks]
    return SeriesRow(
        interval=Interval(min(row.interval.start for row in parts), max(row.interval.end for row in parts)),
        tasks=sum(row.tasks for row in parts),
        errors=sum(row.errors for row in parts),
        cancelled=sum(row.cancelled for row in parts),
        total_time=round(math.fsum(row.total_time for row in parts), 6),  # whole microseconds
        min=min((row.min for row in timed), default=0.0),
        max=max((row.max for row in timed), default=0.0),
        tokens_in=sum(row.tokens_in for row in parts),
        tokens_out=sum(row.tokens_out for row in parts),
        cost=round(math.fsum(row.cost for row in parts), 9),
        buckets=merged(row.buckets for row in parts),
        zeros=sum(row.zeros for row in parts),
        error_types=_added_types(row.error_types for row in parts if row.errors),
    )


def _added_types(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for types in parts:
        for error, count in types.items():
            total[error] = total.get(error, 0) + count
    return total


Rows = tuple[SeriesRow, ...]


def series(
    flusher: Flusher,
    agent_or_agents: str | Iterable[str] | None = None,
    *,
    window: Window = "1h",
    step: Window = "1m",
    as_of: Timestamp = None,
) -> Flow[Rows | dict[str, Rows]]:
    """Read the rows of one agent, or of several or all agents by name. Checks its arguments when it is called."""
    if isinstance(agent_or_agents, str):
        return series_of(flusher, agent_or_agents, window, step, as_of)
    return series_by_name(flusher, agent_or_agents, window, step, as_of)


def series_of(flusher: Flusher, agent_name: str, window: Window, step: Window, as_of: Timestamp) -> Flow[Rows]:
    """Read the rows of one agent, like `series`."""
    time, step_ms = asked_steps(window, step, as_of)
    return _of_one(flusher, arguments.name("agent_or_agents", agent_name), time, step_ms)


def series_by_name(
    flusher: Flusher, agent_names: Iterable[str] | None, window: Window, step: Window, as_of: Timestamp
) -> Flow[dict[str, Rows]]:
    """Read the rows of several agents by name, or of all agents if `agent_names` is None, like `series`."""
    time, step_ms = asked_steps(window, step, as_of)
    names = None if agent_names is None else arguments.names("agent_or_agents", agent_names)
    return _of_many(flusher, names, time, step_ms)


def _of_one(flusher: Flusher, agent_name: str, time: TimeRange, step_ms: int) -> Flow[Rows]:
    found = yield from _of_many(flusher, (agent_name,), time, step_ms)
    return found[agent_name]


def _of_many(flusher: Flusher, names: Sequence[str] | None, time: TimeRange, step_ms: int) -> Flow[dict[str, Rows]]:
    yield from own_records_counted(flusher)
    if names is None:
        listed = yield from listed_names(flusher)
        wanted = [(shard, name) for shard, encoded in enumerate(listed) for name in encoded]
        agents = sorted({keys.decoded(name) for _, name in wanted})
    else:
        agents = list(dict.fromkeys(names))
        wanted = [(shard, keys.metrics_series(name)) for name in agents for shard in _shards(name)]
    by_agent: dict[str, list[Rows]] = {name: [] for name in agents}
    if wanted:
        for name, rows in (yield from _read(flusher, wanted, time, step_ms)):
            by_agent[name].append(rows)
    return {name: _added(found) for name, found in by_agent.items()}


def _shards(agent_name: str) -> Iterable[int]:
    """Return the shards with data of an agent: all shards for ``__other__``, one for any other agent."""
    return range(keys.METRICS_SHARDS) if agent_name == OTHER else (keys.metrics_shard(agent_name),)


def _added(found: Sequence[Rows]) -> Rows:
    return found[0] if len(found) == 1 else tuple(merged_rows(rows) for rows in zip(*found, strict=True))


def _read(
    flusher: Flusher, wanted: Sequence[tuple[int, str]], time: TimeRange, step_ms: int
) -> Flow[list[tuple[str, Rows]]]:
    """Read series, given by shard and encoded name. Returns the decoded name and rows of each, in the same order."""
    at_once = max(1, STEPS_AT_ONCE // math.ceil(time.window_ms / step_ms))
    by_shard: dict[int, list[str]] = {}
    for shard, name in wanted:
        by_shard.setdefault(shard, []).append(name)
    chunks = [
        (shard, names[first : first + at_once])
        for shard, names in by_shard.items()
        for first in range(0, len(names), at_once)
    ]
    replies: list[SeriesReply] = yield from Batch(
        tuple(read_series(flusher.backend.namespace, shard, names, time, step_ms) for shard, names in chunks)
    )
    widest = max(reply.needed_ms for reply in replies)
    if widest:
        raise step_too_narrow(step_ms, widest)
    found = {
        (shard, name): rows
        for (shard, names), of_names in zip(chunks, _aligned(replies, step_ms), strict=True)
        for name, rows in zip(names, of_names, strict=True)
    }
    return [(keys.decoded(name), found[shard, name]) for shard, name in wanted]


def _aligned(replies: Sequence[SeriesReply], step_ms: int) -> list[list[Rows]]:
    """Return the rows of the series of each reply. All series have the same steps.

    A new step may begin between two calls. Therefore all series get the steps of the latest call. If a step began after
    the call of a series, the series gets a row of zeros for this step.
    """
    from_ms = max(reply.from_ms for reply in replies)
    latest = max(replies, key=lambda reply: reply.to_ms)
    found = []
    for reply in replies:
        skipped = (from_ms - reply.from_ms) // step_ms
        missing = tuple(
            SeriesRow(_interval(latest, start_ms, step_ms)) for start_ms in range(reply.to_ms, latest.to_ms, step_ms)
        )
        found.append([rows[skipped:] + missing for rows in reply.rows] if skipped or missing else reply.rows)
    return found


@dataclass(frozen=True, slots=True)
class SeriesReply:
    """Rows of some series of a shard.

    Attributes:
        now_ms: the server's time, ms since 1970.
        from_ms: start of the first step, ms since 1970.
        to_ms: end of the last step, ms since 1970.
        rows: the rows of each series, in the order of the request.
        needed_ms: 0 if the steps fit the slices that the server keeps. Otherwise, for a part of the window, the server
            keeps only slices of this many ms or more.
    """

    now_ms: int
    from_ms: int
    to_ms: int
    rows: list[Rows]
    needed_ms: int = 0


def read_series(
    namespace: str, shard: int, names: Iterable[str], time: TimeRange, step_ms: int
) -> Command[SeriesReply]:
    """Read some series of a shard step by step.

    Args:
        namespace: the namespace.
        shard: shard of the series.
        names: encoded names of the series.
        time: the window.
        step_ms: length of a step, ms: a multiple of 10,000.
    """
    agents_key = keys.metrics_agents(namespace, shard)
    asked = tuple(names)
    return Command(
        SERIES,
        (agents_key, keys.metrics_settings(namespace, shard)),
        {"window_ms": time.window_ms, "as_of_ms": time.as_of_ms, "step_ms": step_ms, "names...": asked},
        lambda reply: _decoded(agents_key, reply, asked, step_ms),
    )


def _decoded(key: str, reply: Reply, names: tuple[str, ...], step_ms: int) -> SeriesReply:
    try:
        status, now_ms, from_ms, to_ms = map(int, reply[:4])
        if status == 0 and now_ms > 0:
            return SeriesReply(0, 0, 0, [], needed_ms=now_ms)
        if status == 1 and [name.decode() for name in reply[4::2]] == list(names):
            found = SeriesReply(now_ms, from_ms, to_ms, [])
            starts = range(from_ms, to_ms, step_ms)
            if len(starts) > MAX_STEPS + 2:  # the first step may begin before the window, the last may end after it
                raise ValueError(starts)
            empty = tuple(SeriesRow(_interval(found, start_ms, step_ms)) for start_ms in starts)
            found.rows.extend(_rows(text, empty) for text in reply[5::2])
            return found
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}")


def _interval(reply: SeriesReply, start_ms: int, step_ms: int) -> Interval:
    return Interval(start_ms / 1000, min(start_ms + step_ms, reply.now_ms + 1) / 1000)


def _rows(text: bytes, empty: Rows) -> Rows:
    rows = list(empty)
    for line in text.split(b"\n"):
        words = line.strip(_SEPARATOR).split(_SEPARATOR)
        if words[0]:
            at = int(words[0])
            if not 0 <= at < len(rows):
                raise ValueError(text)
            # This loop must be fast: an hour of a thousand agents has 60,000 steps of one minute.
            first = 1
            while words[first : first + 1] == [b"|"]:
                first += 2
            fields = dict(zip(words[first::2], map(int, words[first + 1 :: 2]), strict=True))
            buckets = {index: count for field, count in fields.items() if (index := _BUCKETS[field]) is not None}
            for closed in words[2:first:2]:
                add_closed(closed, fields, buckets)
            get = fields.get
            rows[at] = SeriesRow(
                empty[at].interval,
                get(b"n", 0),
                get(b"err", 0),
                get(b"cancelled", 0),
                get(b"sum_us", 0) / 1e6,
                get(b"min_us", 0) / 1e6,
                get(b"max_us", 0) / 1e6,
                get(b"tok_in", 0),
                get(b"tok_out", 0),
                get(b"cost_nano", 0) / 1e9,
                buckets,
                get(b"h:zero", 0),
                _error_types(fields) if b"err" in fields else {},
            )
    return tuple(rows)


def _error_types(fields: Mapping[bytes, int]) -> dict[str, int]:
    return {field[4:].decode(): count for field, count in fields.items() if field[:4] == b"err:"}


_SEPARATOR = b"\x1f"
"""Separates the words of a step. Error types may contain spaces, but no control characters."""
_MAX_FIELDS = 4096


class _Buckets(dict[bytes, int | None]):
    """Maps the name of a field to the index of the bucket that it counts, or to None if it counts no indexed bucket."""

    def __missing__(self, field: bytes) -> int | None:
        found = None if field == b"h:zero" or field[:2] != b"h:" else int(field[2:])
        if len(self) < _MAX_FIELDS:
            self[field] = found
        return found


_BUCKETS = _Buckets()
