"""The public API of metrics: `MetricsCollector`; its methods for asyncio are in `MetricsCollector.aio`."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.metrics import flows
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
from agentperf_redis.metrics.spans import SpanReport
from agentperf_redis.metrics.windows import Timestamp, Window


class MetricsCollector(Recording):
    """Metrics of agents, shared by all processes of a namespace.

    Recording never waits for the server: it adds to a list, and a thread brings the sums there every second. Reading
    first flushes what this process has recorded. Percentiles are exact while the server holds all raw samples of what
    is asked (1000 an agent), and within 2.17 % beyond; `PerformanceMetrics.exact` says which.

    Args:
        backend: the namespace; None takes the process-wide default.
        retention: how long what is kept, the same for all collectors of a namespace; None takes what it has, or the
            default.
        flush_every: s between two flushes of this process, 0.1 to 60; None is one. What a killed process loses, and how
            late others see what it records, is at most this. A flush costs the server some 0.1 ms for each agent in it,
            so that a thousand agents are better flushed every few seconds.

    Raises:
        InvalidArgument: for a time that cannot be, and if another collector of this process and namespace was given
            another retention or another time.
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
        self._backend = chosen_backend(backend)
        super().__init__(self._backend.share("metrics.flusher", lambda: Flusher(self._backend)))
        if retention is not None:
            self._flusher.settle(retention)
        if flush_every is not None:
            self._flusher.settle_rhythm(flush_every)
        self.start_time = datetime.now()  # noqa: DTZ005  the reference's attribute: naive local time

    def __repr__(self) -> str:
        return f"MetricsCollector(backend={self._backend!r})"

    @cached_property
    def aio(self) -> AsyncMetricsCollector:
        """The same collector for asyncio: every call that does I/O is awaited."""
        return AsyncMetricsCollector(self._flusher)

    def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Timestamp = None
    ) -> PerformanceMetrics:
        """Return the metrics of one agent; counts of zero when nothing was recorded.

        Args:
            agent_name: the agent.
            window: None for all time, or the last seconds or ``"30s"``, ``"5m"``, ``"1h"``, ``"3d"``.
            as_of: the end of the window: a datetime (local time when it has no zone), or s since 1970; None is now.

        Returns:
            A frozen snapshot; reading again gives a new one.

        Raises:
            InvalidArgument: for a name, window or moment that cannot be.
            AgentPerfError: if the server cannot be reached, or holds something else under these keys.
        """
        return self._backend.run(flows.agent(self._flusher, agent_name, window, as_of))

    def snapshots(
        self, *, window: Window = None, as_of: Timestamp = None, percentiles: bool = True
    ) -> dict[str, PerformanceMetrics]:
        """Return the metrics of all agents, sorted by name.

        Args:
            window: as for `get_or_create_metrics`.
            as_of: likewise.
            percentiles: False reads the plain counters only, a third of the work: percentiles are NaN then, and error
                types, models and buckets are empty.

        Raises:
            InvalidArgument: for anything else.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(flows.agents(self._flusher, window, as_of, percentiles=percentiles))

    def combined(self, *agent_names: str, window: Window = None, as_of: Timestamp = None) -> PerformanceMetrics:
        """Return the metrics of several agents as if they were one; of all, when none is named.

        Args:
            agent_names: which.
            window: as for `get_or_create_metrics`.
            as_of: likewise.
        """
        return self._backend.run(flows.combined(self._flusher, agent_names, window, as_of))

    def recent(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """Return an agent's latest executions, the last first, as far as raw samples are kept.

        Args:
            agent_name: the agent.
            limit: how many, 1 to 1000.
        """
        return self._backend.run(flows.recent(self._flusher, agent_name, limit))

    def slowest(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """Return an agent's slowest executions, the slowest first; the server keeps fifty.

        Args:
            agent_name: the agent.
            limit: how many, 1 to 1000.
        """
        return self._backend.run(flows.slowest(self._flusher, agent_name, limit))

    @property
    def metrics(self) -> dict[str, PerformanceMetrics]:
        """The metrics of all agents, of all time: the reference's attribute, read anew each time."""
        return self.snapshots()

    def get_all_metrics(self, window: Window = None, as_of: Timestamp = None) -> dict[str, dict[str, Any]]:
        """Return the summary of each agent, as the reference renders it. Arguments as for `get_or_create_metrics`."""
        return summaries(self.snapshots(window=window, as_of=as_of))

    def summary(self, *, window: Window = None, as_of: Timestamp = None) -> SystemSummary:
        """Return all agents at a glance. Arguments as for `get_or_create_metrics`."""
        return system_summary(self.snapshots(window=window, as_of=as_of, percentiles=False).values())

    def get_system_summary(self, window: Window = None, as_of: Timestamp = None) -> dict[str, Any]:
        """Return all agents at a glance, as the reference renders it. Uptime counts from the first sample."""
        return self.summary(window=window, as_of=as_of).rendered()

    def spans(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> SpanReport:
        """Return where an agent's time goes. Arguments as for `get_or_create_metrics`."""
        return self._backend.run(flows.spans(self._flusher, agent_name, window, as_of))

    def streams(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> StreamMetrics:
        """Return how an agent's streams came. Arguments as for `get_or_create_metrics`."""
        return self._backend.run(flows.streams(self._flusher, agent_name, window, as_of))

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
            by: ``score`` (the reference's, best first), or ``p95``, ``average``, ``total_time``, ``tasks``,
                ``error_rate``, ``errors``, ``cost``, ``tokens``, largest first.
            window: as for `get_or_create_metrics`.
            as_of: likewise.
            min_tasks: leave out agents with fewer executions.

        Returns:
            The agents in order, each with the value it was ranked by.

        Raises:
            InvalidArgument: for anything else.
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
        """Compare an agent with another, or with itself at another time.

        Args:
            agent_name: the agent.
            other: the one to compare it with; None is the same agent.
            window: of the agent, as for `get_or_create_metrics`.
            as_of: of the agent.
            other_window: of the other; None takes `window`.
            other_as_of: of the other; None takes `as_of`, or, for the same agent over a window, the time just before.

        Returns:
            The other first, the agent second, and what changed from one to the other.

        Raises:
            InvalidArgument: for anything else; for the same agent without a window, too.
            AgentPerfError: as `get_or_create_metrics`.
        """
        return self._backend.run(
            flows.compare(self._flusher, (agent_name, window, as_of), (other, other_window, other_as_of))
        )

    def forget(self, agent_name: str) -> bool:
        """Forget an agent that is no more: its counts of all time, raw samples and spans.

        It leaves its place among the 2000 agents that are counted apart. Its slices of time expire by themselves;
        should it come back before, windows show them again.

        Args:
            agent_name: the agent.

        Returns:
            Whether it was known.
        """
        return self._backend.run(flows.forget(self._flusher, agent_name))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded in this process is counted.

        Args:
            timeout: s; None waits as long as the server's deadlines allow.

        Returns:
            Whether all is counted; False when the time was over before. What is not counted is kept and tried again.

        Raises:
            AgentPerfError: what the flush met.
        """
        return self._backend.run(flows.flush(self._flusher, timeout))

    def delivery(self) -> Delivery:
        """Return how this process's records fare on their way to the server. No I/O."""
        return self._flusher.delivery_state()
