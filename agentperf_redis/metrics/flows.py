"""The flows that read metrics, of one agent or of all. A flow is a generator of commands, which the backend runs."""

from __future__ import annotations

from collections.abc import Iterable

from agentperf_redis import arguments, keys
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.commands import ReadReply
from agentperf_redis.metrics.comparison import Comparison, RankBy, Ranked, compared, ranked
from agentperf_redis.metrics.counters import Counters, added, performance
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.model import BETWEEN, FIRST, OTHER, Execution, PerformanceMetrics, StreamMetrics
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.metrics.spans import SpanReport, span_report
from agentperf_redis.windows import ALL_TIME, TimeRange, Timestamp, Window, asked_time

READ_SERIES, READ_SERIES_PLAIN = 16, 64
"""Maximum number of series in one script call. The first value is for reading all counters, the second one for reading
only the plain counters. A call takes 1 to 5 ms of server time if each series has ten slices."""
MAX_EXACT = 1000
MAX_EXACT_OF_MANY = 16
"""When more than `MANY_SERIES` series are read at once, raw durations are read only for series with at most this many
executions."""
MANY_SERIES = 64


def own_records_counted(flusher: Flusher) -> Flow[None]:
    """Flush the records of this process, so that a program reads its own records.

    Raises:
        BackendUnavailable: if the server cannot be reached. Other errors of the flush do not prevent reading.
    """
    _, error = yield from flusher.flushed()
    if isinstance(error, BackendUnavailable):
        raise error


def agents(
    flusher: Flusher,
    window: Window = None,
    as_of: Timestamp = None,
    *,
    percentiles: bool = True,
) -> Flow[dict[str, PerformanceMetrics]]:
    """Read all agents, sorted by name. Like all flows here, it checks its arguments when called, before it runs."""
    return _agents(flusher, asked_time(window, as_of), plain=not arguments.flag("percentiles", percentiles))


def _agents(flusher: Flusher, time: TimeRange, *, plain: bool) -> Flow[dict[str, PerformanceMetrics]]:
    by_agent = yield from _read_counters(flusher, time, plain=plain)
    return {agent: performance(agent, added(by_agent[agent]), plain=plain) for agent in sorted(by_agent)}


def agents_and_total(
    flusher: Flusher, window: Window = None, as_of: Timestamp = None
) -> Flow[tuple[dict[str, PerformanceMetrics], PerformanceMetrics]]:
    """Read each agent, sorted by name, and all agents as if they were one: `agents` and `combined` in one read."""
    return _agents_and_total(flusher, asked_time(window, as_of))


def _agents_and_total(
    flusher: Flusher, time: TimeRange
) -> Flow[tuple[dict[str, PerformanceMetrics], PerformanceMetrics]]:
    by_agent = yield from _read_counters(flusher, time, plain=False)
    counter_sets = [counters for each in by_agent.values() for counters in each]
    found = {agent: performance(agent, added(by_agent[agent])) for agent in sorted(by_agent)}
    return found, _total(counter_sets)


def _total(counter_sets: list[Counters]) -> PerformanceMetrics:
    return performance("*", added(counter_sets)) if counter_sets else PerformanceMetrics("*")


def totals(flusher: Flusher) -> Flow[dict[str, Counters]]:
    """Read the all-time counters of all agents, with histograms, error types and models, without raw durations."""
    by_agent = yield from _read_counters(flusher, ALL_TIME, plain=False, max_exact=0)
    return {agent: added(by_agent[agent]) for agent in sorted(by_agent)}


def agent_names(flusher: Flusher) -> Flow[list[str]]:
    """List all agents, sorted by name."""
    yield from own_records_counted(flusher)
    listed = yield from listed_names(flusher)
    return sorted({keys.decoded(name) for names in listed for name in names})


def last_seen(flusher: Flusher, agent_name: str | None = None) -> Flow[dict[str, float]]:
    """Return when each agent last recorded, s since 1970. With `agent_name`, return only that agent, if it is known."""
    return _last_seen(flusher, None if agent_name is None else arguments.name("agent_name", agent_name))


def _last_seen(flusher: Flusher, agent_name: str | None) -> Flow[dict[str, float]]:
    yield from own_records_counted(flusher)
    alone = agent_name is not None and agent_name != OTHER  # an agent is in one shard, `__other__` is in every shard
    shards = (keys.metrics_shard(agent_name),) if agent_name and alone else range(keys.METRICS_SHARDS)
    namespace = flusher.backend.namespace
    listed: list[dict[str, float]] = yield from Batch(tuple(commands.last_seen(namespace, each) for each in shards))
    found: dict[str, float] = {}
    for of_shard in listed:
        for encoded, seen in of_shard.items():
            name = keys.decoded(encoded)
            if agent_name in (None, name):
                found[name] = max(seen, found.get(name, 0.0))
    return found


def retention(flusher: Flusher) -> Flow[Retention]:
    """Return the retention of the namespace. Only the TTLs of slices are stored. Its other values are the defaults."""
    namespace = flusher.backend.namespace
    stored: list[Retention | None] = yield from Batch(
        tuple(commands.stored_retention(namespace, shard) for shard in range(keys.METRICS_SHARDS))
    )
    return next((each for each in stored if each is not None), Retention())


def listed_names(flusher: Flusher) -> Flow[list[list[str]]]:
    """List the encoded names of the agents of each shard."""
    namespace = flusher.backend.namespace
    return (yield from Batch(tuple(commands.agents(namespace, shard) for shard in range(keys.METRICS_SHARDS))))


def _read_counters(
    flusher: Flusher, time: TimeRange, *, plain: bool, max_exact: int = MAX_EXACT
) -> Flow[dict[str, list[Counters]]]:
    """Read all agents. Only ``__other__`` may have several sets of counters, one for each shard."""
    yield from own_records_counted(flusher)
    listed = yield from listed_names(flusher)
    wanted = [(shard, name) for shard, names in enumerate(listed) for name in names]
    counter_sets = yield from _read(flusher, wanted, time, plain=plain, max_exact=max_exact)
    by_agent: dict[str, list[Counters]] = {}
    for (_, name), counters in zip(wanted, counter_sets, strict=True):
        by_agent.setdefault(keys.decoded(name), []).append(counters)
    return by_agent


def combined(
    flusher: Flusher,
    agent_names: tuple[str, ...],
    window: Window = None,
    as_of: Timestamp = None,
) -> Flow[PerformanceMetrics]:
    """Read several agents, or all, as if they were one."""
    return _combined(flusher, arguments.names("agent_names", agent_names), asked_time(window, as_of))


def _combined(flusher: Flusher, agent_names: tuple[str, ...], time: TimeRange) -> Flow[PerformanceMetrics]:
    if not agent_names:
        by_agent = yield from _read_counters(flusher, time, plain=False)
        return _total([counters for each in by_agent.values() for counters in each])
    yield from own_records_counted(flusher)
    wanted = [(keys.metrics_shard(name), keys.metrics_series(name)) for name in dict.fromkeys(agent_names)]
    counter_sets = yield from _read(flusher, wanted, time)
    return performance("+".join(agent_names), added(counter_sets))


def forget(flusher: Flusher, agent_name: str) -> Flow[bool]:
    """Flush this process's records, then delete the agent."""
    return _forget(flusher, arguments.name("agent_name", agent_name))


def _forget(flusher: Flusher, agent_name: str) -> Flow[bool]:
    yield from own_records_counted(flusher)
    # An agent is in one shard, but `__other__` is in every shard.
    shards = range(keys.METRICS_SHARDS) if agent_name == OTHER else (keys.metrics_shard(agent_name),)
    forgotten: list[bool] = yield from Batch(
        tuple(commands.forget(flusher.backend.namespace, agent_name, shard) for shard in shards)
    )
    return any(forgotten)


def recent(flusher: Flusher, agent_name: str, limit: int) -> Flow[tuple[Execution, ...]]:
    """Read the latest executions of an agent."""
    name = arguments.name("agent_name", agent_name)
    return _executions(
        flusher, commands.recent(flusher.backend.namespace, name, arguments.count("limit", limit, maximum=1000))
    )


def slowest(flusher: Flusher, agent_name: str, limit: int) -> Flow[tuple[Execution, ...]]:
    """Read the slowest executions of an agent."""
    name = arguments.name("agent_name", agent_name)
    return _executions(
        flusher, commands.slowest(flusher.backend.namespace, name, arguments.count("limit", limit, maximum=1000))
    )


def _executions(flusher: Flusher, command: Command[tuple[Execution, ...]]) -> Flow[tuple[Execution, ...]]:
    yield from own_records_counted(flusher)
    return (yield from command)


def agent(
    flusher: Flusher,
    agent_name: str,
    window: Window = None,
    as_of: Timestamp = None,
) -> Flow[PerformanceMetrics]:
    """Read one agent. An unknown agent has counts of zero."""
    return _agent(flusher, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _agent(flusher: Flusher, agent_name: str, time: TimeRange) -> Flow[PerformanceMetrics]:
    yield from own_records_counted(flusher)
    (counters,) = yield from _read(flusher, [(keys.metrics_shard(agent_name), keys.metrics_series(agent_name))], time)
    return performance(agent_name, counters)


def chosen(
    flusher: Flusher, agent_names: Iterable[str], window: Window = None, as_of: Timestamp = None
) -> Flow[dict[str, PerformanceMetrics]]:
    """Read some agents by name, without a flush of this process's records. An unknown agent has counts of zero."""
    return _chosen(flusher, list(dict.fromkeys(arguments.names("agent_names", agent_names))), asked_time(window, as_of))


def _chosen(flusher: Flusher, agent_names: list[str], time: TimeRange) -> Flow[dict[str, PerformanceMetrics]]:
    wanted = [(keys.metrics_shard(name), keys.metrics_series(name)) for name in agent_names]
    counter_sets = yield from _read(flusher, wanted, time)
    return {name: performance(name, counters) for name, counters in zip(agent_names, counter_sets, strict=True)}


def spans(
    flusher: Flusher,
    agent_name: str,
    window: Window = None,
    as_of: Timestamp = None,
) -> Flow[SpanReport]:
    """Read all spans of an agent."""
    return _spans(flusher, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _spans(flusher: Flusher, agent_name: str, time: TimeRange) -> Flow[SpanReport]:
    yield from own_records_counted(flusher)
    shard, series = keys.metrics_shard(agent_name), keys.metrics_series(agent_name)
    parts = yield from commands.parts(flusher.backend.namespace, agent_name)
    wanted = ["", *sorted(part for part in parts if part.startswith("/"))]
    counter_sets = yield from _read(flusher, [(shard, series + part) for part in wanted], time)
    found = {}
    for part, counters in zip(wanted, counter_sets, strict=True):
        path = tuple(keys.decoded(step) for step in part.split("/")[1:])
        found[path] = (performance("/".join((agent_name, *path)), counters), counters.counts.get("self_us", 0))
    return span_report(agent_name, found)


def streams(
    flusher: Flusher,
    agent_name: str,
    window: Window = None,
    as_of: Timestamp = None,
) -> Flow[StreamMetrics]:
    """Read the metrics of an agent's streams."""
    return _streams(flusher, arguments.name("agent_name", agent_name), asked_time(window, as_of))


def _streams(flusher: Flusher, agent_name: str, time: TimeRange) -> Flow[StreamMetrics]:
    yield from own_records_counted(flusher)
    shard = keys.metrics_shard(agent_name)
    names = [keys.metrics_series(agent_name, (), measure) for measure in ("", FIRST, BETWEEN)]
    own, first, between = yield from _read(flusher, [(shard, name) for name in names], time)
    return StreamMetrics(
        own.counts.get("items", 0),
        performance(f"{agent_name}#{FIRST}", first),
        performance(f"{agent_name}#{BETWEEN}", between),
    )


def rank(
    flusher: Flusher,
    by: RankBy | str,
    window: Window = None,
    as_of: Timestamp = None,
    min_tasks: int = 1,
) -> Flow[tuple[Ranked, ...]]:
    """Read all agents and rank them."""
    chosen = arguments.choice("by", by, RankBy)
    arguments.count("min_tasks", min_tasks, minimum=0)
    return _rank(agents(flusher, window, as_of), chosen, min_tasks)


def _rank(reading: Flow[dict[str, PerformanceMetrics]], by: RankBy, min_tasks: int) -> Flow[tuple[Ranked, ...]]:
    found = yield from reading
    return ranked(found.values(), by, min_tasks)


AgentQuery = tuple[str | None, Window, Timestamp]
"""An agent's name, a window and its end."""


def compare(flusher: Flusher, query: AgentQuery, other: AgentQuery) -> Flow[Comparison]:
    """Read two agents, or one agent in two time ranges, and compare."""
    agent_name, window, as_of = query
    name = arguments.name("agent_name", agent_name)
    time = asked_time(window, as_of)
    other_name, other_window, other_as_of = other
    if other_name is None and other_window is None and other_as_of is None and window is None:
        raise InvalidArgument(
            "other", None, "the name of an agent; None needs a window, and compares with the time before it"
        )
    names = ("window" if other_window is None else "other_window", "as_of" if other_as_of is None else "other_as_of")
    other_time = asked_time(
        window if other_window is None else other_window, as_of if other_as_of is None else other_as_of, names=names
    )
    before = other_name is None and other_as_of is None and other_window is None
    other_agent = name if other_name is None else arguments.name("other", other_name)
    return _compare(flusher, (name, time), (other_agent, other_time), before)


def _compare(
    flusher: Flusher, query: tuple[str, TimeRange], other: tuple[str, TimeRange], before: bool
) -> Flow[Comparison]:
    name, time = query
    other_name, other_time = other
    second = yield from _agent(flusher, name, time)
    if before:  # `first` covers as much time as `second`, and ends where `second` starts
        other_time = TimeRange(other_time.window_ms, round(second.interval.start * 1000))
    first = yield from _agent(flusher, other_name, other_time)
    return compared(first, second)


def _read(
    flusher: Flusher,
    wanted: Iterable[tuple[int, str]],
    time: TimeRange,
    *,
    plain: bool = False,
    max_exact: int = MAX_EXACT,
) -> Flow[list[Counters]]:
    """Read series, given by shard and encoded name; return their counters in the same order.

    The raw durations of a series are read if it has at most `max_exact` of them.
    """
    series = list(wanted)
    at_once = READ_SERIES_PLAIN if plain else READ_SERIES
    by_shard: dict[int, list[str]] = {}
    for shard, name in series:
        by_shard.setdefault(shard, []).append(name)
    chunks = [
        (shard, names[first : first + at_once])
        for shard, names in by_shard.items()
        for first in range(0, len(names), at_once)
    ]
    if plain:
        max_exact = -1
    elif len(series) > MANY_SERIES:
        max_exact = min(max_exact, MAX_EXACT_OF_MANY)
    replies: list[ReadReply] = yield from Batch(
        tuple(
            commands.read(
                flusher.backend.namespace,
                shard,
                names,
                window_ms=time.window_ms,
                as_of_ms=time.as_of_ms,
                max_exact=max_exact,
            )
            for shard, names in chunks
        )
    )
    found = {
        (shard, name): counters
        for (shard, _), reply in zip(chunks, replies, strict=True)
        for name, counters in reply.counter_sets.items()
    }
    return [found[each] for each in series]


def flush(flusher: Flusher, timeout: float | None = None) -> Flow[bool]:
    """Wait until all records are counted, at most `timeout` seconds. Returns whether all are counted."""
    return _flush(flusher, None if timeout is None else arguments.seconds("timeout", timeout, minimum=0.0))


def _flush(flusher: Flusher, timeout: float | None) -> Flow[bool]:
    ended, error = yield from flusher.flushed(timeout)
    if error is not None:
        raise error
    return ended
