"""Results of the metrics service: frozen snapshots. Some convert to the dicts that the in-memory version returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.metrics.histogram import estimated_quantile, exact_quantile
from agentperf_redis.windows import Interval as Interval  # noqa: PLC0414  other modules import it from here

_TOP_ERRORS = 5
_NO_TIME = Interval(0.0, 0.0)
OTHER = "__other__"
"""Name under which data beyond a limit is counted, such as an agent's 65th error type."""


FIRST, BETWEEN = "ttft", "between"
"""The two measures of a stream: the time to its first item, and the mean time between further items."""


def seconds(us: int) -> float:
    """Convert whole microseconds to seconds."""
    return us / 1e6


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """The usage of one language model.

    Attributes:
        calls: number of calls.
        tokens_in: tokens sent, including those of the provider's cache.
        tokens_out: tokens received, including reasoning.
        cost: cost in the caller's unit, rounded to 10^-9.
        tokens_cached_in: the part of `tokens_in` that was read from the provider's cache.
        tokens_cache_write: the part of `tokens_in` that was written to the provider's cache.
        tokens_reasoning: the part of `tokens_out` that was reasoning.
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    tokens_cached_in: int = 0
    tokens_cache_write: int = 0
    tokens_reasoning: int = 0


@dataclass(frozen=True, slots=True)
class PerformanceMetrics:
    """Metrics of one agent at the time of the read. Fields up to `last_execution` are those of the in-memory version.

    Attributes:
        agent_name: the agent.
        task_count: executions, including failed and cancelled ones.
        success_count: executions that succeeded.
        failure_count: executions that failed.
        total_execution_time: sum of the durations, s.
        min_execution_time: shortest duration, s; infinite without executions.
        max_execution_time: longest duration, s.
        avg_execution_time: average duration, s.
        p50_execution_time: 50th percentile of the durations, s.
        p95_execution_time: 95th percentile of the durations, s.
        p99_execution_time: 99th percentile of the durations, s.
        execution_times: all durations in s, in the order in which the executions ended; empty if the server does not
            hold all of them.
        error_types: failures by type.
        last_execution: end of the last execution, local time; None without executions.
        cancelled_count: executions that were cancelled.
        exact: True if percentiles are exact (to 1 us). Otherwise, their error is at most `error_bound`.
        error_bound: maximum error of a percentile, as a share of the exact percentile: 0 or 0.0217.
        buckets: the histogram; see `agentperf_redis.metrics.histogram`.
        zeros: number of durations of 0 us.
        tokens_in: tokens sent to models, including those of the providers' caches.
        tokens_out: tokens received from models, including reasoning.
        cost: cost of the models, rounded to 10^-9.
        llm_calls: number of model calls.
        tool_calls: number of tool calls.
        models: usage by model.
        interval: the covered time range.
        tokens_cached_in: the part of `tokens_in` that was read from the providers' caches.
        tokens_cache_write: the part of `tokens_in` that was written to the providers' caches.
        tokens_reasoning: the part of `tokens_out` that was reasoning.
    """

    agent_name: str
    task_count: int = 0
    success_count: int = 0
    failure_count: int = 0
    total_execution_time: float = 0.0
    min_execution_time: float = float("inf")
    max_execution_time: float = 0.0
    avg_execution_time: float = 0.0
    p50_execution_time: float = 0.0
    p95_execution_time: float = 0.0
    p99_execution_time: float = 0.0
    execution_times: tuple[float, ...] = ()
    error_types: Mapping[str, int] = field(default_factory=dict)
    last_execution: datetime | None = None
    cancelled_count: int = 0
    exact: bool = True
    error_bound: float = 0.0
    buckets: Mapping[int, int] = field(default_factory=dict)
    zeros: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    llm_calls: int = 0
    tool_calls: int = 0
    models: Mapping[str, ModelUsage] = field(default_factory=dict)
    interval: Interval = _NO_TIME
    tokens_cached_in: int = 0
    tokens_cache_write: int = 0
    tokens_reasoning: int = 0

    @property
    def success_rate(self) -> float:
        """Share of executions that succeeded, 0 to 1."""
        return self.success_count / self.task_count if self.task_count > 0 else 0.0

    @property
    def failure_rate(self) -> float:
        """Share of executions that failed, 0 to 1."""
        return self.failure_count / self.task_count if self.task_count > 0 else 0.0

    @property
    def score(self) -> float:
        """The in-memory version's score: success rate / (average duration in s + 1)."""
        return self.success_rate / (self.avg_execution_time + 1)

    @property
    def throughput(self) -> float:
        """Executions per second of the covered time range."""
        return self.task_count / self.interval.seconds if self.interval.seconds > 0 else 0.0

    def quantile(self, share: float) -> float:
        """Return any quantile of the durations.

        Args:
            share: 0 to 1; 0.9 is the 90th percentile.

        Returns:
            Seconds: exact if `exact`, otherwise within `error_bound`; 0.0 without executions.

        Raises:
            InvalidArgument: for an invalid share, such as 95.
        """
        share = arguments.amount("share", share, maximum=1.0)
        if self.execution_times:
            return exact_quantile(sorted(self.execution_times), share)
        return estimated_quantile(
            self.buckets, self.zeros, share, minimum=self.min_execution_time, maximum=self.max_execution_time
        )

    def get_summary(self) -> dict[str, Any]:
        """Return the same dict as the in-memory version, with counts as numbers and other values as text."""
        return {
            "agent_name": self.agent_name,
            "task_count": self.task_count,
            "success_rate": f"{self.success_rate:.1%}",
            "failure_rate": f"{self.failure_rate:.1%}",
            "avg_execution_time": f"{self.avg_execution_time:.2f}s",
            "p50_execution_time": f"{self.p50_execution_time:.2f}s",
            "p95_execution_time": f"{self.p95_execution_time:.2f}s",
            "p99_execution_time": f"{self.p99_execution_time:.2f}s",
            "min_execution_time": f"{self.min_execution_time:.2f}s",
            "max_execution_time": f"{self.max_execution_time:.2f}s",
            "top_errors": dict(sorted(self.error_types.items(), key=lambda item: item[1], reverse=True)[:_TOP_ERRORS]),
        }


@dataclass(frozen=True, slots=True)
class Execution:
    """One raw sample.

    Attributes:
        ended: end of the execution, local time.
        seconds: duration of the execution, s.
        success: whether the execution succeeded.
        cancelled: whether the execution was cancelled.
        error_type: error type of a failure, if known.
    """

    ended: datetime
    seconds: float
    success: bool
    cancelled: bool
    error_type: str | None


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """Timing of an agent's streams.

    Attributes:
        items: number of items that all streams produced.
        first: time to the first item. Each stream contributes one value.
        between: mean time to produce each further item. Each stream contributes one value.
    """

    items: int
    first: PerformanceMetrics
    between: PerformanceMetrics


@dataclass(frozen=True, slots=True)
class AgentRanking:
    """One agent in the ranking.

    Attributes:
        agent: name of the agent.
        score: success rate / (average duration in s + 1).
        success_rate: share of executions that succeeded, 0 to 1.
        avg_execution_time: average duration, s.
    """

    agent: str
    score: float
    success_rate: float
    avg_execution_time: float

    def rendered(self) -> dict[str, Any]:
        """Return the dict that the in-memory version returns."""
        return {
            "agent": self.agent,
            "score": f"{self.score:.3f}",
            "success_rate": f"{self.success_rate:.1%}",
            "avg_time": f"{self.avg_execution_time:.2f}s",
        }


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """A summary of all agents.

    Attributes:
        uptime: time since the first sample, or the length of the window, s.
        total_tasks: number of executions.
        total_successes: executions that succeeded.
        total_failures: executions that failed.
        total_cancelled: executions that were cancelled.
        active_agents: number of agents with executions in the covered time range.
        rankings: the agents, the best first.
        interval: the covered time range.
    """

    uptime: float
    total_tasks: int
    total_successes: int
    total_failures: int
    total_cancelled: int
    active_agents: int
    rankings: tuple[AgentRanking, ...]
    interval: Interval

    @property
    def success_rate(self) -> float:
        """Share of executions that succeeded, 0 to 1."""
        return self.total_successes / self.total_tasks if self.total_tasks > 0 else 0.0

    @property
    def throughput(self) -> float:
        """Executions per second."""
        return self.total_tasks / self.uptime if self.uptime > 0 else 0.0

    def rendered(self) -> dict[str, Any]:
        """Return the dict that the in-memory version returns."""
        return {
            "uptime": f"{self.uptime:.0f}s",
            "total_tasks": self.total_tasks,
            "total_successes": self.total_successes,
            "total_failures": self.total_failures,
            "overall_success_rate": f"{self.success_rate:.1%}" if self.total_tasks > 0 else "0%",
            "throughput": f"{self.throughput:.2f} tasks/s" if self.uptime > 0 else "0 tasks/s",
            "active_agents": self.active_agents,
            "agent_rankings": [ranking.rendered() for ranking in self.rankings],
        }


def summaries(agents: Mapping[str, PerformanceMetrics]) -> dict[str, dict[str, Any]]:
    """Return the summary of each agent, by name."""
    return {name: agent.get_summary() for name, agent in agents.items()}


def system_summary(agents: Iterable[PerformanceMetrics]) -> SystemSummary:
    """Return the summary of all agents."""
    active = [agent for agent in agents if agent.task_count > 0]
    ranked = sorted(active, key=lambda agent: (-agent.score, agent.agent_name))
    interval = Interval(
        min((agent.interval.start for agent in active), default=0.0),
        max((agent.interval.end for agent in active), default=0.0),
    )
    return SystemSummary(
        uptime=interval.seconds,
        total_tasks=sum(agent.task_count for agent in active),
        total_successes=sum(agent.success_count for agent in active),
        total_failures=sum(agent.failure_count for agent in active),
        total_cancelled=sum(agent.cancelled_count for agent in active),
        active_agents=len(active),
        rankings=tuple(
            AgentRanking(agent.agent_name, agent.score, agent.success_rate, agent.avg_execution_time)
            for agent in ranked
        ),
        interval=interval,
    )


@dataclass(frozen=True, slots=True)
class Delivery:
    """How many records of this process are counted, pending or dropped.

    ``recorded == counted + pending + dropped`` always holds.

    Attributes:
        recorded: executions recorded in this process.
        counted: executions that the server has confirmed.
        pending: executions that are not confirmed yet.
        dropped: executions that were dropped, because a key of their agent has the wrong type on the server.
        uncertain: executions that may have been counted twice. The flush that sent them had no reply for so long that
            the server may have forgotten its sequence number. So they were sent again.
        samples_dropped: raw samples that were counted but not kept.
        other: executions counted under ``__other__``.
        usage_unread: model calls recorded without tokens, because their ``usage=`` had no token counts.
        usage_inconsistent: usages with a total that is not input plus output. The parts are counted, not the total.
        last_error: error of the latest flush; None if it succeeded.
    """

    recorded: int
    counted: int
    pending: int
    dropped: int
    uncertain: int
    samples_dropped: int
    other: int
    usage_unread: int
    usage_inconsistent: int
    last_error: str | None
