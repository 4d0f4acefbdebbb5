"""The commands of the metrics service: their arguments and their replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis import keys
from agentperf_redis.command import Arg, Command, Reply, whole_number
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics.accumulator import (
    CANCELLED,
    MAX_RAW,
    MAX_SLOW,
    OK,
    Samples,
    Series,
    columns,
    slowest_of,
)
from agentperf_redis.metrics.buffer import WRITER_KEEP_S, FlushBatch
from agentperf_redis.metrics.closed_slices import add_closed
from agentperf_redis.metrics.counters import Counters
from agentperf_redis.metrics.histogram import ZERO, micros
from agentperf_redis.metrics.model import Execution
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.script import Script
from agentperf_redis.windows import LAST_MS, local_timestamp

FLUSH = Script("metrics/flush")
READ = Script("metrics/read")
FORGET = Script("metrics/forget")

MAX_AGENTS = 160
"""Maximum number of agents in one shard. It allows 2000 agents in 16 shards, with a margin because they do not spread
evenly: the mean per shard is 125, the standard deviation 11."""
MAX_PARTS = 200
MAX_ERRORS = 64
IDLE_S = 86_400.0
"""When the limit for names is reached, a name that was unused for this many seconds gives way to a new one. So old
names, such as agents named after a job, do not keep new ones out for good. An agent of a daily job keeps its name."""

COUNTED, REPEATED = 1, 0


@dataclass(frozen=True, slots=True)
class Flushed:
    """The result of flushing a batch.

    Attributes:
        now: the server's time, s since 1970.
        other: executions counted under ``__other__``.
        outdated: raw samples that were too old to keep.
    """

    now: float
    other: int
    outdated: int


@dataclass(frozen=True, slots=True)
class ReadReply:
    """Counters of some series of a shard.

    Attributes:
        now_ms: the server's time, ms since 1970.
        counter_sets: counters by the series' encoded name.
    """

    now_ms: int
    counter_sets: dict[str, Counters]


def flush(
    namespace: str, batch: FlushBatch, *, now: float, retention: Retention, firm: bool = False, server_ms: int = -1
) -> Command[Flushed]:
    """Send a batch, which the server adds to its counters.

    Args:
        namespace: the namespace.
        batch: the batch.
        now: the present time by the buffer's clock. The ages of the samples are relative to it.
        retention: how long slices and samples are kept.
        firm: whether the user chose the retention. Otherwise it is the default, and applies only if the namespace has
            no stored retention.
        server_ms: the server's time at `now`, ms since 1970; -1 if it is unknown.
    """
    series: dict[Series, int] = {}
    accumulators: list[Arg] = []
    for packed in batch.accumulators:
        accumulator = packed.accumulator
        index = series.setdefault(packed.series, len(series) + 1)
        fields = dict(accumulator.counts)
        if accumulator.min_us is not None:
            fields["min_us"] = accumulator.min_us
            fields["max_us"] = accumulator.max_us
        accumulators += (
            index,
            _ms(now - accumulator.oldest),
            _ms(now - accumulator.newest),
            packed.width_s * 1000,
            len(fields),
        )
        for name, value in fields.items():
            accumulators += (name, value)
        accumulators += _samples(accumulator.raw, now)
    shard = batch.shard
    names = [each.name for each in series]
    agents = keys.metrics_agents(namespace, shard)
    keep_10s_ms, keep_1m_ms, keep_1h_ms, keep_1d_ms = retention.slices_ms
    return Command(
        FLUSH,
        (
            agents,
            keys.metrics_settings(namespace, shard),
            keys.metrics_writer(namespace, shard, batch.writer),
            *(keys.metrics_total(namespace, shard, name) for name in names),
            *(keys.metrics_latest(namespace, shard, name) for name in names),
            *(keys.metrics_slow(namespace, shard, name) for name in names),
        ),
        {
            "seq": batch.seq,
            "writer_keep_ms": _ms(WRITER_KEEP_S),
            "firm": 1 if firm else 0,
            "keep_10s_ms": keep_10s_ms,
            "keep_1m_ms": keep_1m_ms,
            "keep_1h_ms": keep_1h_ms,
            "keep_1d_ms": keep_1d_ms,
            "max_recent": min(MAX_RAW, retention.recent_count),
            "recent_keep_ms": _ms(retention.recent),
            "max_slow": MAX_SLOW,
            "slow_keep_ms": _ms(retention.slow),
            "max_agents": MAX_AGENTS,
            "max_parts": MAX_PARTS,
            "max_errors": MAX_ERRORS,
            "idle_ms": _ms(IDLE_S),
            "sample_tag": f"{batch.writer}-{batch.seq}",
            "sent_ms": server_ms,
            "names...": tuple(names),
            "cells...": tuple(accumulators),
        },
        lambda reply: _flushed(agents, reply),
    )


def agents(namespace: str, shard: int) -> Command[list[str]]:
    """Return the encoded names of the agents of a shard."""
    key = keys.metrics_agents(namespace, shard)
    return Command("ZRANGE", (key,), (0, -1), lambda reply: _names(key, reply))


def last_seen(namespace: str, shard: int) -> Command[dict[str, float]]:
    """Return when each agent of a shard last recorded, s since 1970, by encoded name."""
    key = keys.metrics_agents(namespace, shard)
    return Command("ZRANGE", (key,), (0, -1, "WITHSCORES"), lambda reply: _times_seen(key, reply))


def stored_retention(namespace: str, shard: int) -> Command[Retention | None]:
    """Return the stored TTLs of slices; None if no process of this version has stored any."""
    key = keys.metrics_settings(namespace, shard)

    def decode(reply: Reply) -> Retention | None:
        try:
            schema, *ttls = reply
            if schema is None:
                return None
            if schema != _SETTINGS_SCHEMA:
                raise ValueError(schema)
            of_10s, of_1m, of_1h, of_1d = (whole_number(text and text.removesuffix(b"ms")) / 1000 for text in ttls)
            return Retention(of_10s, of_1m, of_1h, of_1d)
        except (AttributeError, TypeError, ValueError):  # Retention raises InvalidArgument, which is a ValueError
            raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None

    return Command("HMGET", (key,), ("schema", "10s", "1m", "1h", "1d"), decode)


_SETTINGS_SCHEMA = b"2"


def parts(namespace: str, agent: str) -> Command[list[str]]:
    """Return the encoded names of an agent's spans and measures, such as ``/plan/search`` and ``#ttft``."""
    key = keys.metrics_parts(namespace, keys.metrics_shard(agent), agent)
    return Command("ZRANGE", (key,), (0, -1), lambda reply: _names(key, reply))


def read(
    namespace: str,
    shard: int,
    names: Iterable[str],
    *,
    window_ms: int,
    as_of_ms: int,
    max_exact: int,
) -> Command[ReadReply]:
    """Read some series of a shard.

    Args:
        namespace: the namespace.
        shard: shard of the series.
        names: encoded names of the series.
        window_ms: length of the window, ms; 0 for all time.
        as_of_ms: end of the window, ms since 1970; -1 for now.
        max_exact: read the raw durations of a series if it has at most this many; -1 reads only the plain counters.
    """
    agents_key = keys.metrics_agents(namespace, shard)
    return Command(
        READ,
        (agents_key, keys.metrics_settings(namespace, shard)),
        {"window_ms": window_ms, "as_of_ms": as_of_ms, "max_exact": max_exact, "names...": tuple(names)},
        lambda reply: _answer(agents_key, reply, plain=max_exact < 0),
    )


def forget(namespace: str, agent: str, shard: int) -> Command[bool]:
    """Delete the index entry and the all-time counts of an agent. Returns whether the agent existed."""
    series = keys.metrics_series(agent)
    agents_key = keys.metrics_agents(namespace, shard)
    return Command(
        FORGET,
        (
            agents_key,
            keys.metrics_parts(namespace, shard, agent),
            keys.metrics_total(namespace, shard, series),
            keys.metrics_latest(namespace, shard, series),
            keys.metrics_slow(namespace, shard, series),
        ),
        {"agent": series},
        lambda reply: _forgotten(agents_key, reply),
    )


def _forgotten(key: str, reply: Reply) -> bool:
    try:
        status, _ = reply
        if status in (0, 1):
            return bool(status)
    except (TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {reply!r}")


def recent(namespace: str, agent: str, limit: int) -> Command[tuple[Execution, ...]]:
    """Return the latest raw samples of an agent, the newest first."""
    key = keys.metrics_latest(namespace, keys.metrics_shard(agent), keys.metrics_series(agent))

    def decode(reply: Reply) -> tuple[Execution, ...]:
        # The stored list is in the order of the flushes. So sort the executions by the time at which they ended.
        found = _executions(key, reply)[::-1]
        newest_first = sorted(found, key=lambda each: each.ended, reverse=True)
        return tuple(newest_first[:limit])

    return Command("LRANGE", (key,), (0, -1), decode)


def slowest(namespace: str, agent: str, limit: int) -> Command[tuple[Execution, ...]]:
    """Return the slowest raw samples of an agent, the slowest first."""
    key = keys.metrics_slow(namespace, keys.metrics_shard(agent), keys.metrics_series(agent))
    return Command("ZRANGE", (key,), (0, limit - 1, "REV"), lambda reply: _executions(key, reply))


def _executions(key: str, reply: Reply) -> tuple[Execution, ...]:
    found = []
    try:
        for member in reply:
            end_ms, duration, outcome, *_ = member.decode().split("|")
            if len(duration) > _MAX_DURATION_CHARACTERS:
                raise ValueError(duration)
            kind, _, error = outcome.partition(":")
            found.append(
                Execution(
                    ended=local_timestamp(int(end_ms)),
                    seconds=int(duration.removesuffix("us")) / 1e6,
                    success=kind == OK,
                    cancelled=kind == CANCELLED,
                    error_type=keys.decoded(error) if error else None,
                )
            )
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None
    return tuple(found)


_MAX_DURATION_CHARACTERS = len("us") + 15
"""A longer text stands for a duration of more than 30 years, so another program wrote it."""


def _samples(raw: Samples, now: float) -> tuple[str, str]:
    """Return raw samples in the format of `flush.lua`: first those that may be among the slowest, then the others."""
    texts = [
        f"{int((now - when) * 1000)} {micros(seconds)}us|{_shown_outcome(outcome)}"
        for when, seconds, outcome in columns(raw)
    ]
    if len(texts) <= MAX_SLOW:
        return " ".join(texts), ""
    slowest = set(slowest_of(raw))
    return (
        " ".join([texts[index] for index in slowest]),
        " ".join([text for index, text in enumerate(texts) if index not in slowest]),
    )


@lru_cache(maxsize=1024)
def _shown_outcome(outcome: str) -> str:
    """Return an outcome such as ``err:TimeoutError``, with the separators of the sample format encoded."""
    kind, colon, error = outcome.partition(":")
    return kind + colon + keys.encoded(error)


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _flushed(key: str, reply: Reply) -> Flushed:
    try:
        status, now_ms, other, outdated = reply
        if status in (COUNTED, REPEATED):
            return Flushed(int(now_ms) / 1000, int(other), int(outdated))
    except (TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {reply!r}")


def _names(key: str, reply: Reply) -> list[str]:
    try:
        return [name.decode() for name in reply]
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(key, f"an unexpected reply {reply!r}") from None


def _times_seen(key: str, reply: Reply) -> dict[str, float]:
    try:
        found = {name.decode(): float(score) / 1000 for name, score in zip(reply[::2], reply[1::2], strict=True)}
        if all(0 <= seen * 1000 <= LAST_MS for seen in found.values()):
            return found
    except (AttributeError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}")


def _answer(key: str, reply: Reply, *, plain: bool) -> ReadReply:
    try:
        status, now_ms, from_ms, to_ms = map(int, reply[:4])
        if status != COUNTED:
            raise ValueError(status)
        return ReadReply(now_ms, (_read_plain_counters if plain else _read_counters)(reply, (from_ms, to_ms)))
    except (AttributeError, IndexError, TypeError, ValueError):
        raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None


def _read_counters(reply: Reply, interval_ms: tuple[int, int]) -> dict[str, Counters]:
    counter_sets = {}
    at = 4
    while at < len(reply):
        first, end = at + 2, at + 2 + 2 * reply[at + 1]
        fields = dict(zip(reply[first:end:2], reply[first + 1 : end : 2], strict=True))
        buckets: dict[int, int] = {}
        for line in reply[end + 1].split(b"\n"):
            if line:
                add_closed(line, fields, buckets)
        counter_sets[reply[at].decode()] = _counters(fields, buckets, reply[end], interval_ms)
        at = end + 2
    return counter_sets


def _read_plain_counters(reply: Reply, interval_ms: tuple[int, int]) -> dict[str, Counters]:
    counter_sets = {}
    for at in range(4, len(reply), 1 + len(_PLAIN)):
        counts = dict(zip(_PLAIN, reply[at + 1 : at + 1 + len(_PLAIN)], strict=True))
        counts["cancelled"] = counts["n"] - counts["ok"] - counts["err"]
        for name in _EXTREMES:
            if counts[name] < 0:
                del counts[name]
        _check_times(counts)
        counter_sets[reply[at].decode()] = Counters(counts, {}, {}, {}, (), _covered(counts, interval_ms))
    return counter_sets


_EXTREMES = ("min_us", "max_us", "last_ms", "first_ms")
_TOKEN_PARTS = ("tok_cached_in", "tok_cache_write", "tok_reasoning")
_PLAIN = (
    *("n", "ok", "err", "sum_us", "llm_calls", "tool_calls", "tok_in", "tok_out", "cost_nano"),
    *_EXTREMES,
    *_TOKEN_PARTS,
)
"""The plain counters, in the order of the reply of `read.lua`."""


def _check_times(counts: Mapping[str, int]) -> None:
    """Raise ValueError for a time after the year 9999, which no datetime can express."""
    if not all(0 <= counts.get(name, 0) <= LAST_MS for name in ("first_ms", "last_ms")):
        raise ValueError("a time after the year 9999")


def _covered(counts: Mapping[str, int], interval_ms: tuple[int, int]) -> tuple[int, int]:
    """Return the time range that a read covers. A range of all time starts with the first sample."""
    start, end = interval_ms
    return interval_ms if start else (counts.get("first_ms", end), end)


def _counters(
    fields: Mapping[bytes, int], buckets: dict[int, int], durations: bytes, interval_ms: tuple[int, int]
) -> Counters:
    counts: dict[str, int] = {}
    errors: dict[str, int] = {}
    models: dict[str, dict[str, int]] = {}
    for field, value in fields.items():
        kind, name, bucket = _field(field)
        if kind == _BUCKET:
            buckets[bucket] = buckets.get(bucket, 0) + value
        elif kind == _COUNT:
            counts[name] = value
        elif kind == _ERROR:
            errors[name] = value
        else:
            model, _, measure = name.rpartition(":")
            models.setdefault(keys.decoded(model), {})[measure] = value
    _check_times(counts)
    durations_us = tuple(map(int, durations.split()))
    return Counters(counts, errors, buckets, models, durations_us, _covered(counts, interval_ms))


_COUNT, _ERROR, _BUCKET, _MODEL = range(4)


@lru_cache(maxsize=4096)
def _field(field: bytes) -> tuple[int, str, int]:
    """Split the name of a stored counter into kind and rest. The third result is a bucket's index, otherwise 0."""
    name = field.decode()
    kind, _, rest = name.partition(":")
    if kind == "h" and rest != ZERO:
        return _BUCKET, rest, int(rest)
    if kind == "err" and rest:
        return _ERROR, rest, 0
    if kind == "mdl":
        return _MODEL, rest, 0
    return _COUNT, name, 0
