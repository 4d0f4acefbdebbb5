"""The public API of metrics: `MetricsCollector`. Its asyncio methods are in `MetricsCollector.aio`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from typing import Any, overload

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics import flows, workers
from agentperf_redis.metrics.async_client import AsyncMetricsCollector
from agentperf_redis.metrics.comparison import Comparison, RankBy, Ranked
from agentperf_redis.metrics.flusher import MAX_FLUSH_EVERY_S, Flusher
from agentperf_redis.metrics.model import (
    Delivery,
    Execution,
    PerformanceMetrics,
    StreamMetrics,
    SystemSummary,
    summaries,
    system_summary,
)
from agentperf_redis.metrics.recording import Recording
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.metrics.series import SeriesRow, series
from agentperf_redis.metrics.spans import SpanReport
from agentperf_redis.metrics.workers import RunningExecution, WorkerInfo
from agentperf_redis.windows import Timestamp, Window


class MetricsCollector(Recording):
    """Metrics of agents, shared by all processes of a namespace.

    Recording never waits for the server: it adds to a list, and a thread sends the sums every second. Reading first
    flushes the records of this process. The server keeps 1000 raw samples per agent. Percentiles are exact if these
    include every sample of the time range. Otherwise percentiles are estimates with an error of at most 2.17 %; see
    `PerformanceMetrics.exact`.

    Args:
        backend: the server and namespace; None takes the process-wide default.
        retention: how long data is kept; all collectors of a namespace must have the same. None takes the retention
            stored on the server, or the default if none is stored.
        flush_every: seconds between two flushes of this process, 0.1 to 60; None is one second. A killed process loses
            at most the records of one such interval. Other processes see a record at most one interval later. A flush
            costs the server about 0.1 ms for each agent with new records. With a thousand agents, an interval of a few
            seconds is better.

    Raises:
        InvalidArgument: for an invalid `flush_every`, and if another collector of this process and namespace has a
            different retention or flush interval.
    """

    def __init__(
        self,
        *,
        backend: Backend | None = None,
        retention: Retention | None = None,
        flush_every: float | None = None,
    ) -> None:
        if flush_every is not None:
            flush_every = arguments.seconds("flush_every", flush_every, minimum=0.1, maximum=MAX_FLUSH_EVERY_S)
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidArgument("retention", retention, "a Retention, or None")
        self._backend = chosen_backend(backend)
        super().__init__(self._backend.share("metrics.flusher", lambda: Flusher(self._backend)))
        if retention is not None:
            self._flusher.settle(retention)
        if flush_every is not None:
            self._flusher.settle_rhythm(flush_every)
        self._start_time = datetime.now()  # noqa: DTZ005  naive local time, as in the in-memory version

    def __repr__(self) -> str:
        return f"MetricsCollector(backend={self._backend!r})"

    @property
    def start_time(self) -> datetime:
        """The local time at which this object was made.

        It cannot be assigned, and does not affect uptime or throughput: these count from the first record.
        """
        return self._start_time

    @cached_property
    def aio(self) -> AsyncMetricsCollector:
        """The same collector for asyncio: every call with I/O is awaited."""
        return AsyncMetricsCollector(self._flusher)

    def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Timestamp = None
    ) -> PerformanceMetrics:
        """Return the metrics of one agent. For an agent without records, all counts are zero.

        Args:
            agent_name: the agent.
            window: length of the window, in seconds or as ``"30s"``, ``"5m"``, ``"1h"``, ``"3d"``; None for all time.
            as_of: end of the window: a datetime (local time if it has no zone), or seconds since 1970; None for now.

        Returns:
            A frozen snapshot; each call returns a new one.

        Raises:
            InvalidArgument: for an invalid name, window or timestamp.
            AgentPerfError: if the server cannot be reached, or a key holds data that this library did not write.
        """
        return self._backend.run(flows.agent(self._flusher, agent_name, window, as_of))

    def snapshots(
        self, *, window: Window = None, as_of: Timestamp = None, percentiles: bool = True
    ) -> dict[str, PerformanceMetrics]:
        """Return the metrics of all agents, sorted by name.

        Args:
            window: as for `get_or_create_metrics`.
            as_of: as for `get_or_create_metrics`.
            percentiles: False reads only the plain counters, which is a third of the work. In this case, percentiles
                are NaN, and error types, models and buckets are empty.

        Raises:
            InvalidArgument: for an invalid argument.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(flows.agents(self._flusher, window, as_of, percentiles=percentiles))

    def combined(self, *agent_names: str, window: Window = None, as_of: Timestamp = None) -> PerformanceMetrics:
        """Return the metrics of several agents as if they were one agent. Without names, combine all agents.

        Args:
            agent_names: the agents.
            window: as for `get_or_create_metrics`.
            as_of: as for `get_or_create_metrics`.
        """
        return self._backend.run(flows.combined(self._flusher, agent_names, window, as_of))

    def recent(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """Return an agent's latest executions, newest first. They are no older than the retention of raw samples.

        Args:
            agent_name: the agent.
            limit: how many, 1 to 1000.
        """
        return self._backend.run(flows.recent(self._flusher, agent_name, limit))

    def slowest(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """Return an agent's slowest executions, slowest first. The server keeps 50 per agent.

        Args:
            agent_name: the agent.
            limit: how many, 1 to 1000.
        """
        return self._backend.run(flows.slowest(self._flusher, agent_name, limit))

    @property
    def metrics(self) -> dict[str, PerformanceMetrics]:
        """The all-time metrics of all agents, as in the in-memory version; each access reads the server."""
        return self.snapshots()

    def get_all_metrics(self, window: Window = None, as_of: Timestamp = None) -> dict[str, dict[str, Any]]:
        """Return each agent's summary as a dict of formatted text, as the in-memory version does.

        Arguments as for `get_or_create_metrics`.
        """
        return summaries(self.snapshots(window=window, as_of=as_of))

    def summary(self, *, window: Window = None, as_of: Timestamp = None) -> SystemSummary:
        """Return a summary of all agents together. Arguments as for `get_or_create_metrics`."""
        return system_summary(self.snapshots(window=window, as_of=as_of, percentiles=False).values())

    def get_system_summary(self, window: Window = None, as_of: Timestamp = None) -> dict[str, Any]:
        """Return `summary` as a dict of formatted text, for example ``"60s"``, as the in-memory version does.

        Uptime is the time since the first sample; with a window, it is the length of the window.
        """
        return self.summary(window=window, as_of=as_of).rendered()

    def spans(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> SpanReport:
        """Return how much time an agent spent in each of its spans. Arguments as for `get_or_create_metrics`."""
        return self._backend.run(flows.spans(self._flusher, agent_name, window, as_of))

    def streams(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> StreamMetrics:
        """Return the metrics of an agent's streams. Arguments as for `get_or_create_metrics`."""
        return self._backend.run(flows.streams(self._flusher, agent_name, window, as_of))

    @overload
    def series(  # type: ignore[overload-overlap]  # a str is also an Iterable[str]
        self, agent_or_agents: str, *, window: Window = ..., step: Window = ..., as_of: Timestamp = ...
    ) -> tuple[SeriesRow, ...]: ...

    @overload
    def series(
        self,
        agent_or_agents: Iterable[str] | None = ...,
        *,
        window: Window = ...,
        step: Window = ...,
        as_of: Timestamp = ...,
    ) -> dict[str, tuple[SeriesRow, ...]]: ...

    def series(
        self,
        agent_or_agents: str | Iterable[str] | None = None,
        *,
        window: Window = "1h",
        step: Window = "1m",
        as_of: Timestamp = None,
    ) -> tuple[SeriesRow, ...] | dict[str, tuple[SeriesRow, ...]]:
        """Return metrics over time: one row a step, oldest first.

        Args:
            agent_or_agents: one agent; or several agents; or None for all agents.
            window: length of the window, as for `get_or_create_metrics`.
            step: length of a step, in the same form as `window`. It is a multiple of ten seconds, at least a 2000th of
                the window, and at most the whole window. Steps begin at multiples of their length since 1970 (UTC).
            as_of: end of the window, as for `get_or_create_metrics`.

        Returns:
            For one agent, its rows; otherwise the rows of each agent by name. The rows cover the window, so the first
            step may begin before the window, and the last step may end after the window. No step begins after now. A
            step without data has a row of zeros.

        Raises:
            InvalidArgument: for an invalid argument, and if the server keeps only slices wider than a step for a part
                of the window. By default, the server keeps slices of 10 s for 15 minutes, of 1 m for 3 hours, of 1 h
                for 8 days and of 1 d for 90 days.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(series(self._flusher, agent_or_agents, window=window, step=step, as_of=as_of))

    def rank(
        self,
        by: RankBy | str = RankBy.SCORE,
        *,
        window: Window = None,
        as_of: Timestamp = None,
        min_tasks: int = 1,
    ) -> tuple[Ranked, ...]:
        """Rank all agents.

        Args:
            by: ``score`` (that of the in-memory version, best agent first), ``p95``, ``average``, ``total_time``,
                ``tasks``, ``error_rate``, ``errors``, ``cost`` or ``tokens`` (largest value first).
            window: as for `get_or_create_metrics`.
            as_of: as for `get_or_create_metrics`.
            min_tasks: minimum number of executions; agents with fewer are omitted.

        Returns:
            The agents in order, each with the value by which it is ranked.

        Raises:
            InvalidArgument: for an invalid argument.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(flows.rank(self._flusher, by, window, as_of, min_tasks))

    def compare(
        self,
        agent_name: str,
        other: str | None = None,
        *,
        window: Window = None,
        as_of: Timestamp = None,
        other_window: Window = None,
        other_as_of: Timestamp = None,
    ) -> Comparison:
        """Compare an agent with another, or with itself in another time range.

        Args:
            agent_name: the agent.
            other: the agent to compare it with; None compares the agent with itself.
            window: window of the agent, as for `get_or_create_metrics`.
            as_of: end of the agent's window.
            other_window: window of the other side, which is `other` or the agent itself. None takes `window`.
            other_as_of: end of the other side's window. None takes `as_of`, or the start of the agent's window if the
                agent is compared with itself and `other_window` is None as well.

        Returns:
            A comparison: `first` is the other side, `second` is the agent, `changes` are the changes from first to
            second.

        Raises:
            InvalidArgument: for an invalid argument, and if an agent is compared with itself without any window.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(
            flows.compare(self._flusher, (agent_name, window, as_of), (other, other_window, other_as_of))
        )

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Return the processes that have recorded executions or hold leases, sorted by host and process.

        The list comes from heartbeats: an idle process stays listed while its client is open. See `WorkerInfo`.

        Raises:
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(workers.workers(self._flusher))

    def running(self, agent: str | None = None) -> tuple[RunningExecution, ...]:
        """Return the tracked executions that have begun and not ended, the oldest first. Hung calls are among them.

        An execution is listed once it has run for a second and its worker has sent a heartbeat. That is at most six
        seconds after the execution began. Each worker lists its oldest 50 executions. Executions of a killed process
        stay listed for 25 s after its last heartbeat. From 12 s after this heartbeat, their `alive` is False.

        Args:
            agent: only the executions of this agent; None for all.

        Raises:
            InvalidArgument: for an invalid name.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(workers.running(self._flusher, agent))

    def forget(self, agent_name: str) -> bool:
        """Delete an agent that is no longer used: its all-time counts, raw samples and spans.

        The agent no longer counts against the limit of 2000 agents. Its time slices remain until they expire. If the
        agent records again before they expire, windows contain these slices again.

        Args:
            agent_name: the agent.

        Returns:
            Whether the agent existed.
        """
        return self._backend.run(flows.forget(self._flusher, agent_name))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all records of this process are counted.

        Args:
            timeout: max seconds to wait; None waits until the flush succeeds or fails.

        Returns:
            Whether all records are counted; False after the timeout. Uncounted records are kept and sent again.

        Raises:
            AgentPerfError: the flush failed with this error.
        """
        return self._backend.run(flows.flush(self._flusher, timeout))

    def delivery(self) -> Delivery:
        """Return how many records of this process are counted, pending or dropped. Does no I/O."""
        return self._flusher.delivery_state()
