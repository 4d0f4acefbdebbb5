"""Reading metrics: several commands in a row, for one agent or for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from agentperf_redis import arguments, keys
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.commands import Answer
from agentperf_redis.metrics.model import PerformanceMetrics, Tally, added, performance
from agentperf_redis.metrics.recorder import Recorder

READ_SERIES = 16
"""Series of one script call: about 2 ms of the server's time with five slices each."""
EXACT_MOST = 1000
EXACT_MOST_OF_MANY = 16
"""With many agents asked at once, raw durations are fetched only where they are few."""
MANY_SERIES = 64

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_WINDOW_ALLOWED = 'None, seconds, or a text such as "30s", "5m", "1h", "3d"'
_LATEST_S = 253_402_300_799.0
"""The end of the year 9999, where names of slices end."""


@dataclass(frozen=True, slots=True)
class Span:
    """The time asked for.

    Attributes:
        window_ms: its length; 0 is all time.
        as_of_ms: its end, ms since 1970; -1 is now.
    """

    window_ms: int = 0
    as_of_ms: int = -1


ALL_TIME = Span()


def asked_time(window: str | float | None, as_of: datetime | float | None) -> Span:
    """Check a window and the moment of its end.

    Raises:
        InvalidArgument: for anything else than what is documented; `as_of` without a window among it.
    """
    if window is None:
        if as_of is not None:
            raise InvalidArgument("as_of", as_of, "a moment together with a window; counts of all time have no past")
        return ALL_TIME
    return Span(round(window_seconds(window) * 1000), _moment_ms(as_of))


def window_seconds(window: str | float) -> float:
    """Turn ``"5m"`` or a number of seconds into seconds."""
    number: object = window
    scale = 1.0
    if isinstance(window, str):
        scale = _UNITS.get(window[-1:], 0.0)
        digits = window[:-1]
        if not scale or not digits.isascii() or not digits.replace(".", "", 1).isdigit():
            raise InvalidArgument("window", window, _WINDOW_ALLOWED)
        number = float(digits)
    length = arguments.number("window", number, _WINDOW_ALLOWED) * scale
    if not 1.0 <= length <= arguments.MAX_SECONDS:
        raise InvalidArgument("window", window, "one second to ten years")
    return length


def _moment_ms(as_of: datetime | float | None) -> int:
    if as_of is None:
        return -1
    allowed = "None, a datetime, or seconds since 1970"
    seconds = as_of.timestamp() if isinstance(as_of, datetime) else arguments.number("as_of", as_of, allowed)
    if not 0.0 <= seconds <= _LATEST_S:
        raise InvalidArgument("as_of", as_of, "a moment between 1970 and 9999")
    return round(seconds * 1000)


def own_records_counted(recorder: Recorder) -> Flow[None]:
    """Flush this process's own records, so that a program sees what it just did.

    Raises:
        BackendUnavailable: if the server cannot be reached. Other troubles of a flush are no reason not to read.
    """
    _, error = yield from recorder.flushed()
    if isinstance(error, BackendUnavailable):
        raise error


def agents(
    recorder: Recorder, window: str | float | None = None, as_of: datetime | float | None = None
) -> Flow[dict[str, PerformanceMetrics]]:
    """Read all agents, sorted by name. Arguments are checked at once, not when the flow runs; so they are below."""
    return _agents(recorder, asked_time(window, as_of))


def _agents(recorder: Recorder, time: Span) -> Flow[dict[str, PerformanceMetrics]]:
    namespace = recorder.backend.namespace
    yield from own_records_counted(recorder)
    listed = yield from Batch(tuple(commands.agents(namespace, shard) for shard in range(keys.METRICS_SHARDS)))
    wanted = [(shard, name) for shard, names in enumerate(listed) for name in names]
    tallies = yield from _read(recorder, wanted, time)
    by_agent: dict[str, list[Tally]] = {}
    for (_, name), tally in zip(wanted, tallies, strict=True):
        by_agent.setdefault(keys.decoded(name), []).append(tally)
    return {agent: performance(agent, added(by_agent[agent])) for agent in sorted(by_agent)}


def agent(
    recorder: Recorder,
    agent_name: str,
    window: str | float | None = None,
    as_of: datetime | float | None = None,
) -> Flow[PerformanceMetrics]:
    """Read one agent; one that is not known has counts of zero."""
    return _agent(recorder, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _agent(recorder: Recorder, agent_name: str, time: Span) -> Flow[PerformanceMetrics]:
    yield from own_records_counted(recorder)
    (tally,) = yield from _read(recorder, [(keys.metrics_shard(agent_name), keys.metrics_series(agent_name))], time)
    return performance(agent_name, tally)


def _read(recorder: Recorder, wanted: Iterable[tuple[int, str]], time: Span) -> Flow[list[Tally]]:
    """Read series, given by shard and encoded name; the tallies come in the same order."""
    places = list(wanted)
    by_shard: dict[int, list[str]] = {}
    for shard, name in places:
        by_shard.setdefault(shard, []).append(name)
    asked = [
        (shard, names[first : first + READ_SERIES])
        for shard, names in by_shard.items()
        for first in range(0, len(names), READ_SERIES)
    ]
    answers: list[Answer] = yield from Batch(
        tuple(
            commands.read(
                recorder.backend.namespace,
                shard,
                names,
                window_ms=time.window_ms,
                as_of_ms=time.as_of_ms,
                exact_most=EXACT_MOST if len(places) <= MANY_SERIES else EXACT_MOST_OF_MANY,
            )
            for shard, names in asked
        )
    )
    found = {
        (shard, name): tally
        for (shard, _), answer in zip(asked, answers, strict=True)
        for name, tally in answer.tallies.items()
    }
    return [found[place] for place in places]


def flush(recorder: Recorder, timeout: float | None = None) -> Flow[bool]:
    """Wait until everything recorded is counted, at most `timeout` seconds. Returns whether it is."""
    return _flush(recorder, None if timeout is None else arguments.seconds("timeout", timeout, least=0.0))


def _flush(recorder: Recorder, timeout: float | None) -> Flow[bool]:
    ended, error = yield from recorder.flushed(timeout)
    if error is not None:
        raise error
    return ended
