"""Reading metrics: several commands in a row, for one agent or for all."""

from __future__ import annotations

from collections.abc import Iterable

from agentperf_redis import arguments, keys
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.commands import Answer
from agentperf_redis.metrics.comparison import Comparison, RankBy, Ranked, compared, ranked
from agentperf_redis.metrics.counters import Tally, added, performance
from agentperf_redis.metrics.flusher import Recorder
from agentperf_redis.metrics.model import BETWEEN, FIRST, Execution, PerformanceMetrics, StreamMetrics
from agentperf_redis.metrics.spans import SpanReport, span_report
from agentperf_redis.metrics.windows import Moment, Stretch, Window, asked_time

READ_SERIES, READ_SERIES_PLAIN = 16, 48
"""Series of one script call, whole or plain: 1 to 2 ms of the server's time with eight slices each."""
EXACT_MOST = 1000
EXACT_MOST_OF_MANY = 16
"""With many agents asked at once, raw durations are fetched only where they are few."""
MANY_SERIES = 64


def own_records_counted(recorder: Recorder) -> Flow[None]:
    """Flush this process's own records, so that a program sees what it just did.

    Raises:
        BackendUnavailable: if the server cannot be reached. Other troubles of a flush are no reason not to read.
    """
    _, error = yield from recorder.flushed()
    if isinstance(error, BackendUnavailable):
        raise error


def agents(
    recorder: Recorder,
    window: Window = None,
    as_of: Moment = None,
    *,
    percentiles: bool = True,
) -> Flow[dict[str, PerformanceMetrics]]:
    """Read all agents, sorted by name. Arguments are checked at once, not when the flow runs; so they are below."""
    return _agents(recorder, asked_time(window, as_of), plain=not arguments.flag("percentiles", percentiles))


def _agents(recorder: Recorder, time: Stretch, *, plain: bool) -> Flow[dict[str, PerformanceMetrics]]:
    by_agent = yield from _tallies(recorder, time, plain=plain)
    return {agent: performance(agent, added(by_agent[agent]), plain=plain) for agent in sorted(by_agent)}


def _tallies(recorder: Recorder, time: Stretch, *, plain: bool) -> Flow[dict[str, list[Tally]]]:
    """Read all agents. What went beyond the guards has a tally in each shard."""
    namespace = recorder.backend.namespace
    yield from own_records_counted(recorder)
    listed = yield from Batch(tuple(commands.agents(namespace, shard) for shard in range(keys.METRICS_SHARDS)))
    wanted = [(shard, name) for shard, names in enumerate(listed) for name in names]
    tallies = yield from _read(recorder, wanted, time, plain=plain)
    by_agent: dict[str, list[Tally]] = {}
    for (_, name), tally in zip(wanted, tallies, strict=True):
        by_agent.setdefault(keys.decoded(name), []).append(tally)
    return by_agent


def combined(
    recorder: Recorder,
    agent_names: tuple[str, ...],
    window: Window = None,
    as_of: Moment = None,
) -> Flow[PerformanceMetrics]:
    """Read several agents, or all, as if they were one."""
    return _combined(recorder, arguments.names("agent_names", agent_names), asked_time(window, as_of))


def _combined(recorder: Recorder, agent_names: tuple[str, ...], time: Stretch) -> Flow[PerformanceMetrics]:
    if agent_names:
        yield from own_records_counted(recorder)
        wanted = [(keys.metrics_shard(name), keys.metrics_series(name)) for name in dict.fromkeys(agent_names)]
        tallies = yield from _read(recorder, wanted, time)
    else:
        by_agent = yield from _tallies(recorder, time, plain=False)
        tallies = [tally for each in by_agent.values() for tally in each]
    return performance("+".join(agent_names) or "*", added(tallies)) if tallies else PerformanceMetrics("*")


def forget(recorder: Recorder, agent_name: str) -> Flow[bool]:
    """Count what this process still holds of an agent, then forget it."""
    return _forget(recorder, arguments.name("agent_name", agent_name))


def _forget(recorder: Recorder, agent_name: str) -> Flow[bool]:
    yield from own_records_counted(recorder)
    return (yield from commands.forget(recorder.backend.namespace, agent_name))


def recent(recorder: Recorder, agent_name: str, limit: int) -> Flow[tuple[Execution, ...]]:
    """Read the latest executions of an agent."""
    name = arguments.name("agent_name", agent_name)
    return _executions(
        recorder, commands.recent(recorder.backend.namespace, name, arguments.count("limit", limit, most=1000))
    )


def slowest(recorder: Recorder, agent_name: str, limit: int) -> Flow[tuple[Execution, ...]]:
    """Read the slowest executions of an agent."""
    name = arguments.name("agent_name", agent_name)
    return _executions(
        recorder, commands.slowest(recorder.backend.namespace, name, arguments.count("limit", limit, most=1000))
    )


def _executions(recorder: Recorder, command: Command[tuple[Execution, ...]]) -> Flow[tuple[Execution, ...]]:
    yield from own_records_counted(recorder)
    return (yield from command)


def agent(
    recorder: Recorder,
    agent_name: str,
    window: Window = None,
    as_of: Moment = None,
) -> Flow[PerformanceMetrics]:
    """Read one agent; one that is not known has counts of zero."""
    return _agent(recorder, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _agent(recorder: Recorder, agent_name: str, time: Stretch) -> Flow[PerformanceMetrics]:
    yield from own_records_counted(recorder)
    (tally,) = yield from _read(recorder, [(keys.metrics_shard(agent_name), keys.metrics_series(agent_name))], time)
    return performance(agent_name, tally)


def spans(
    recorder: Recorder,
    agent_name: str,
    window: Window = None,
    as_of: Moment = None,
) -> Flow[SpanReport]:
    """Read all spans of an agent."""
    return _spans(recorder, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _spans(recorder: Recorder, agent_name: str, time: Stretch) -> Flow[SpanReport]:
    yield from own_records_counted(recorder)
    shard, series = keys.metrics_shard(agent_name), keys.metrics_series(agent_name)
    parts = yield from commands.parts(recorder.backend.namespace, agent_name)
    wanted = ["", *sorted(part for part in parts if part.startswith("/"))]
    tallies = yield from _read(recorder, [(shard, series + part) for part in wanted], time)
    found = {}
    for part, tally in zip(wanted, tallies, strict=True):
        path = tuple(keys.decoded(step) for step in part.split("/")[1:])
        found[path] = (performance("/".join((agent_name, *path)), tally), tally.counts.get("self_us", 0))
    return span_report(agent_name, found)


def streams(
    recorder: Recorder,
    agent_name: str,
    window: Window = None,
    as_of: Moment = None,
) -> Flow[StreamMetrics]:
    """Read how the streams of an agent came."""
    return _streams(recorder, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _streams(recorder: Recorder, agent_name: str, time: Stretch) -> Flow[StreamMetrics]:
    yield from own_records_counted(recorder)
    shard = keys.metrics_shard(agent_name)
    names = [keys.metrics_series(agent_name, (), measure) for measure in ("", FIRST, BETWEEN)]
    own, first, between = yield from _read(recorder, [(shard, name) for name in names], time)
    return StreamMetrics(
        own.counts.get("items", 0),
        performance(f"{agent_name}#{FIRST}", first),
        performance(f"{agent_name}#{BETWEEN}", between),
    )


def rank(
    recorder: Recorder,
    by: RankBy | str,
    window: Window = None,
    as_of: Moment = None,
    least_tasks: int = 1,
) -> Flow[tuple[Ranked, ...]]:
    """Read all agents and rank them."""
    chosen = arguments.choice("by", by, RankBy)
    arguments.count("least_tasks", least_tasks, least=0)
    return _rank(agents(recorder, window, as_of), chosen, least_tasks)


def _rank(reading: Flow[dict[str, PerformanceMetrics]], by: RankBy, least_tasks: int) -> Flow[tuple[Ranked, ...]]:
    found = yield from reading
    return ranked(found.values(), by, least_tasks)


AskedAgent = tuple[str | None, Window, Moment]
"""An agent's name, a window and its end."""


def compare(recorder: Recorder, asked: AskedAgent, other: AskedAgent) -> Flow[Comparison]:
    """Read one agent twice, or two agents, and compare."""
    agent_name, window, as_of = asked
    name = arguments.name("agent_name", agent_name)
    time = asked_time(window, as_of)
    other_name, other_window, other_as_of = other
    if other_name is None and other_window is None and other_as_of is None and window is None:
        raise InvalidArgument(
            "other", None, "an agent to compare with; None only with a window, for the time before it"
        )
    names = ("window" if other_window is None else "other_window", "as_of" if other_as_of is None else "other_as_of")
    other_time = asked_time(
        window if other_window is None else other_window, as_of if other_as_of is None else other_as_of, names=names
    )
    before = other_name is None and other_as_of is None and other_window is None
    other_agent = name if other_name is None else arguments.name("other", other_name)
    return _compare(recorder, (name, time), (other_agent, other_time), before)


def _compare(
    recorder: Recorder, asked: tuple[str, Stretch], other: tuple[str, Stretch], before: bool
) -> Flow[Comparison]:
    name, time = asked
    other_name, other_time = other
    second = yield from _agent(recorder, name, time)
    if before:  # the same length of time, up to where the other begins
        other_time = Stretch(other_time.window_ms, round(second.interval.start * 1000))
    first = yield from _agent(recorder, other_name, other_time)
    return compared(first, second)


def _read(
    recorder: Recorder, wanted: Iterable[tuple[int, str]], time: Stretch, *, plain: bool = False
) -> Flow[list[Tally]]:
    """Read series, given by shard and encoded name; the tallies come in the same order."""
    places = list(wanted)
    at_once = READ_SERIES_PLAIN if plain else READ_SERIES
    by_shard: dict[int, list[str]] = {}
    for shard, name in places:
        by_shard.setdefault(shard, []).append(name)
    asked = [
        (shard, names[first : first + at_once])
        for shard, names in by_shard.items()
        for first in range(0, len(names), at_once)
    ]
    exact_most = -1 if plain else EXACT_MOST if len(places) <= MANY_SERIES else EXACT_MOST_OF_MANY
    answers: list[Answer] = yield from Batch(
        tuple(
            commands.read(
                recorder.backend.namespace,
                shard,
                names,
                window_ms=time.window_ms,
                as_of_ms=time.as_of_ms,
                exact_most=exact_most,
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
