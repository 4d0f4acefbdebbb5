"""The commands of the metrics service: what is sent, and what the replies mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis import keys
from agentperf_redis.command import Arg, Command, Reply
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics.accumulator import (
    CANCELLED,
    OK,
    RAW_MOST,
    SLOW_MOST,
    Samples,
    Series,
    columns,
    slowest_of,
)
from agentperf_redis.metrics.buffer import WRITER_KEEP_S, Parcel
from agentperf_redis.metrics.counters import Tally
from agentperf_redis.metrics.histogram import ZERO, micros
from agentperf_redis.metrics.model import Execution
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.metrics.windows import local_moment
from agentperf_redis.script import Script

FLUSH = Script("metrics/flush")
READ = Script("metrics/read")
FORGET = Script("metrics/forget")

AGENTS_MOST = 160
"""Agents of one shard: 2000 in all, and room for an uneven spread over 16 shards (mean 125, deviation 11)."""
PARTS_MOST = 200
ERRORS_MOST = 64

COUNTED, REPEATED, CORRUPT = 1, 0, -1


@dataclass(frozen=True, slots=True)
class Flushed:
    """What became of a parcel.

    Attributes:
        now: the server's time, s since 1970.
        other: executions counted under ``__other__``.
        outdated: raw samples too old to keep.
    """

    now: float
    other: int
    outdated: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Counters of some series of a shard, by their encoded name.

    Attributes:
        now_ms: the server's time.
        tallies: counters by the series' encoded name.
    """

    now_ms: int
    tallies: dict[str, Tally]


def flush(
    namespace: str, parcel: Parcel, *, now: float, retention: Retention, firm: bool = False, server_ms: int = -1
) -> Command[Flushed]:
    """Count a parcel.

    Args:
        namespace: of the installation.
        parcel: what to count.
        now: the buffer's clock, against which its samples have an age.
        retention: how long what is kept.
        firm: whether that is what the user asked for, or just a default for a namespace that has none yet.
        server_ms: the server's time at `now`, ms since 1970; -1 when it is not known.
    """
    series: dict[Series, int] = {}
    cells: list[Arg] = []
    for packed in parcel.cells:
        cell = packed.cell
        place = series.setdefault(packed.series, len(series) + 1)
        fields = dict(cell.counts)
        if cell.min_us is not None:
            fields["min_us"] = cell.min_us
            fields["max_us"] = cell.max_us
        cells += (place, _ms(now - cell.oldest), _ms(now - cell.newest), packed.width_s * 1000, len(fields))
        for name, value in fields.items():
            cells += (name, value)
        cells += _samples(cell.raw, now)
    shard = parcel.shard
    names = [each.name for each in series]
    agents = keys.metrics_agents(namespace, shard)
    return Command(
        FLUSH,
        (
            agents,
            keys.metrics_settings(namespace, shard),
            keys.metrics_writer(namespace, shard, parcel.writer),
            *(keys.metrics_total(namespace, shard, name) for name in names),
            *(keys.metrics_recent(namespace, shard, name) for name in names),
            *(keys.metrics_slow(namespace, shard, name) for name in names),
        ),
        (
            parcel.seq,
            _ms(WRITER_KEEP_S),
            1 if firm else 0,
            *retention.slices_ms,
            min(RAW_MOST, retention.recent_count),
            _ms(retention.recent),
            SLOW_MOST,
            _ms(retention.slow),
            AGENTS_MOST,
            PARTS_MOST,
            ERRORS_MOST,
            f"{parcel.writer}-{parcel.seq}",
            server_ms,
            *names,
            *cells,
        ),
        lambda reply: _flushed(agents, reply),
    )


def agents(namespace: str, shard: int) -> Command[list[str]]:
    """Return the agents of a shard, encoded."""
    key = keys.metrics_agents(namespace, shard)
    return Command("ZRANGE", (key,), (0, -1), lambda reply: _names(key, reply))


def parts(namespace: str, agent: str) -> Command[list[str]]:
    """Return the spans and measures of an agent, encoded: ``/plan/search``, ``#ttft``."""
    key = keys.metrics_parts(namespace, keys.metrics_shard(agent), agent)
    return Command("ZRANGE", (key,), (0, -1), lambda reply: _names(key, reply))


def read(
    namespace: str,
    shard: int,
    names: Iterable[str],
    *,
    window_ms: int,
    as_of_ms: int,
    exact_most: int,
) -> Command[Answer]:
    """Read some series of a shard.

    Args:
        namespace: of the installation.
        shard: of the series.
        names: of the series, encoded.
        window_ms: length of the window; 0 for all time.
        as_of_ms: its end; -1 for now.
        exact_most: ask for all durations of a series when there are no more than this; -1 asks for plain counters only.
    """
    agents_key = keys.metrics_agents(namespace, shard)
    return Command(
        READ,
        (agents_key, keys.metrics_settings(namespace, shard)),
        (window_ms, as_of_ms, exact_most, *names),
        lambda reply: _answer(agents_key, reply, plain=exact_most < 0),
    )


def forget(namespace: str, agent: str) -> Command[bool]:
    """Remove an agent from the index and the counts of all time. Returns whether there was one."""
    shard, series = keys.metrics_shard(agent), keys.metrics_series(agent)
    agents_key = keys.metrics_agents(namespace, shard)
    return Command(
        FORGET,
        (
            agents_key,
            keys.metrics_parts(namespace, shard, agent),
            keys.metrics_total(namespace, shard, series),
            keys.metrics_recent(namespace, shard, series),
            keys.metrics_slow(namespace, shard, series),
        ),
        (series,),
        lambda reply: _forgotten(agents_key, reply),
    )


def _forgotten(key: str, reply: Reply) -> bool:
    try:
        status, first, second = reply
        if status in (0, 1):
            return bool(status)
        if status == CORRUPT:
            raise CorruptState(first.decode(), f"a {second.decode()}")
    except (AttributeError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {reply!r}")


def recent(namespace: str, agent: str, limit: int) -> Command[tuple[Execution, ...]]:
    """Return the latest raw samples of an agent, the last first."""
    key = keys.metrics_recent(namespace, keys.metrics_shard(agent), keys.metrics_series(agent))
    return Command("ZRANGE", (key,), (0, limit - 1, "REV"), lambda reply: _executions(key, reply))


def slowest(namespace: str, agent: str, limit: int) -> Command[tuple[Execution, ...]]:
    """Return the slowest raw samples of an agent, the slowest first."""
    key = keys.metrics_slow(namespace, keys.metrics_shard(agent), keys.metrics_series(agent))
    return Command("ZRANGE", (key,), (0, limit - 1, "REV"), lambda reply: _executions(key, reply))


def _executions(key: str, reply: Reply) -> tuple[Execution, ...]:
    found = []
    try:
        for member in reply:
            end_ms, duration, outcome, _ = member.decode().split("|")
            kind, _, error = outcome.partition(":")
            found.append(
                Execution(
                    ended=local_moment(int(end_ms)),
                    seconds=int(duration.removesuffix("us")) / 1e6,
                    success=kind == OK,
                    cancelled=kind == CANCELLED,
                    error_type=keys.decoded(error) if error else None,
                )
            )
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None
    return tuple(found)


def _samples(raw: Samples, now: float) -> tuple[str, str]:
    """Write raw samples, the slowest first: only they can be among the slowest of all."""
    texts = [
        f"{int((now - when) * 1000)} {micros(seconds)}us|{_shown_outcome(outcome)}"
        for when, seconds, outcome in columns(raw)
    ]
    if len(texts) <= SLOW_MOST:
        return " ".join(texts), ""
    slowest = set(slowest_of(raw))
    return (
        " ".join([texts[place] for place in slowest]),
        " ".join([text for place, text in enumerate(texts) if place not in slowest]),
    )


@lru_cache(maxsize=1024)
def _shown_outcome(outcome: str) -> str:
    """``err:TimeoutError``; what would end the field in a raw sample is encoded."""
    kind, colon, error = outcome.partition(":")
    return kind + colon + keys.encoded(error)


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _flushed(key: str, reply: Reply) -> Flushed:
    try:
        status, first, second, third = reply
        if status in (COUNTED, REPEATED):
            return Flushed(int(first) / 1000, int(second), int(third))
        if status == CORRUPT:
            raise CorruptState(first.decode(), f"a {second.decode()}")
    except (AttributeError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {reply!r}")


def _names(key: str, reply: Reply) -> list[str]:
    try:
        return [name.decode() for name in reply]
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(key, f"an unexpected reply {reply!r}") from None


def _answer(key: str, reply: Reply, *, plain: bool) -> Answer:
    try:
        if reply[0] == CORRUPT:
            raise CorruptState(reply[1].decode(), f"something else ({reply[2].decode()})")
        status, now_ms, from_ms, to_ms = map(int, reply[:4])
        if status != COUNTED:
            raise ValueError(status)
        return Answer(now_ms, (_plain_tallies if plain else _tallies)(reply, (from_ms, to_ms)))
    except (AttributeError, IndexError, TypeError, ValueError):
        raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None


def _tallies(reply: Reply, interval_ms: tuple[int, int]) -> dict[str, Tally]:
    tallies = {}
    at = 4
    while at < len(reply):
        first, end = at + 2, at + 2 + 2 * reply[at + 1]
        fields = zip(reply[first:end:2], reply[first + 1 : end : 2], strict=True)
        tallies[reply[at].decode()] = _tally(fields, reply[end], interval_ms)
        at = end + 1
    return tallies


def _plain_tallies(reply: Reply, interval_ms: tuple[int, int]) -> dict[str, Tally]:
    tallies = {}
    for at in range(4, len(reply), 1 + len(_PLAIN)):
        counts = dict(zip(_PLAIN, reply[at + 1 : at + 1 + len(_PLAIN)], strict=True))
        counts["cancelled"] = counts["n"] - counts["ok"] - counts["err"]
        for name in _EXTREMES:
            if counts[name] < 0:
                del counts[name]
        tallies[reply[at].decode()] = Tally(counts, {}, {}, {}, (), _covered(counts, interval_ms))
    return tallies


_EXTREMES = ("min_us", "max_us", "last_ms", "first_ms")
_TOKEN_PARTS = ("tok_cached_in", "tok_cache_write", "tok_reasoning")
_PLAIN = (
    *("n", "ok", "err", "sum_us", "llm_calls", "tool_calls", "tok_in", "tok_out", "cost_nano"),
    *_EXTREMES,
    *_TOKEN_PARTS,
)
"""The plain counters, in the order in which the script says them."""


def _covered(counts: Mapping[str, int], interval_ms: tuple[int, int]) -> tuple[int, int]:
    """Return the interval of a reading: all time begins with what was first recorded."""
    start, end = interval_ms
    return interval_ms if start else (counts.get("first_ms", end), end)


def _tally(fields: Iterable[tuple[bytes, int]], durations: bytes, interval_ms: tuple[int, int]) -> Tally:
    counts: dict[str, int] = {}
    errors: dict[str, int] = {}
    buckets: dict[int, int] = {}
    models: dict[str, dict[str, int]] = {}
    for field, value in fields:
        kind, name, bucket = _field(field)
        if kind == _BUCKET:
            buckets[bucket] = value
        elif kind == _COUNT:
            counts[name] = value
        elif kind == _ERROR:
            errors[name] = value
        else:
            model, _, measure = name.rpartition(":")
            models.setdefault(keys.decoded(model), {})[measure] = value
    durations_us = tuple(map(int, durations.split()))
    return Tally(counts, errors, buckets, models, durations_us, _covered(counts, interval_ms))


_COUNT, _ERROR, _BUCKET, _MODEL = range(4)


@lru_cache(maxsize=4096)
def _field(field: bytes) -> tuple[int, str, int]:
    """Tell what a stored counter counts: its kind, its name without that of the kind, and of a bucket, which."""
    name = field.decode()
    kind, _, rest = name.partition(":")
    if kind == "h" and rest != ZERO:
        return _BUCKET, rest, int(rest)
    if kind == "err" and rest:
        return _ERROR, rest, 0
    if kind == "mdl":
        return _MODEL, rest, 0
    return _COUNT, name, 0
