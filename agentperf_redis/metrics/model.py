"""What the metrics service answers with: frozen snapshots, and the reference's dicts as renderings of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.metrics.histogram import estimated_quantile, exact_quantile

_TOP_ERRORS = 5
OTHER = "__other__"
"""Under this name is counted what goes beyond the guards: the 2001st agent, the 65th error type of an agent."""


FIRST, BETWEEN = "ttft", "between"
"""Measures of a stream: time to its first item, and mean time between the further ones."""


def seconds(us: int) -> float:
    """Turn whole microseconds into seconds."""
    return us / 1e6


@dataclass(frozen=True, slots=True)
class Interval:
    """The stretch of time an answer covers: whole slices, so it may begin a little before the window asked for.

    Attributes:
        start: its first moment, s since 1970 by the server's clock.
        end: its end (excluded), likewise.
    """

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return max(0.0, self.end - self.start)


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """What one language model was used for.

    Attributes:
        calls: how often it was called.
        tokens_in: tokens sent, those of the provider's cache included.
        tokens_out: tokens received, reasoning included.
        cost: in the unit the caller records, to 10^-9.
        tokens_cached_in: of `tokens_in`, those read from the provider's cache.
        tokens_cache_write: of `tokens_in`, those written to it.
        tokens_reasoning: of `tokens_out`, those that the model thought.
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
    """Metrics of one agent, as they were when read. The first fields are the reference's.

    Attributes:
        agent_name: the agent.
        task_count: executions: succeeded, failed and cancelled.
        success_count: of these, those that succeeded.
        failure_count: those that failed.
        total_execution_time: s.
        min_execution_time: s; infinite when there are none.
        max_execution_time: s.
        avg_execution_time: s.
        p50_execution_time: s.
        p95_execution_time: s.
        p99_execution_time: s.
        execution_times: all durations in s, in order of their end, when the server still holds them all; else empty.
        error_types: failures by type.
        last_execution: when the last one ended, local time; None when there are none.
        cancelled_count: executions that were cancelled.
        exact: whether percentiles are exact (to 1 us) or within `error_bound`.
        error_bound: how far a percentile may be off, relative to the exact one: 0 or 0.0217.
        buckets: the histogram, see `agentperf_redis.metrics.histogram`.
        zeros: durations of 0 us.
        tokens_in: tokens sent to models, those of the providers' caches included.
        tokens_out: tokens received from models, reasoning included.
        cost: what the models cost, to 10^-9.
        llm_calls: calls of models.
        tool_calls: calls of tools.
        models: use of each model.
        interval: the time covered.
        tokens_cached_in: of `tokens_in`, those read from the providers' caches.
        tokens_cache_write: of `tokens_in`, those written to them.
        tokens_reasoning: of `tokens_out`, those that models thought.
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
    interval: Interval = Interval(0.0, 0.0)
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
        """The reference's rank: success rate / (average duration in s + 1)."""
        return self.success_rate / (self.avg_execution_time + 1)

    @property
    def throughput(self) -> float:
        """Executions per second of the time covered."""
        return self.task_count / self.interval.seconds if self.interval.seconds > 0 else 0.0

    def quantile(self, share: float) -> float:
        """Return any quantile of the durations.

        Args:
            share: 0 to 1; 0.9 is the 90th percentile.

        Returns:
            Seconds: exact when `exact`, else within `error_bound`; 0.0 when there are no executions.

        Raises:
            InvalidArgument: for a share that is none, such as 95.
        """
        share = arguments.amount("share", share, maximum=1.0)
        if self.execution_times:
            return exact_quantile(sorted(self.execution_times), share)
        return estimated_quantile(
            self.buckets, self.zeros, share, minimum=self.min_execution_time, maximum=self.max_execution_time
        )

    def get_summary(self) -> dict[str, Any]:
        """Return the reference's summary: counts as numbers, the rest as text."""
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
        ended: when, local time.
        seconds: its duration.
        success: whether it succeeded.
        cancelled: whether it was cancelled.
        error_type: of a failure, if known.
    """

    ended: datetime
    seconds: float
    success: bool
    cancelled: bool
    error_type: str | None


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """How the streams of an agent came.

    Attributes:
        items: of all streams.
        first: time to the first item, one value for each stream.
        between: mean time to make each further item, one value for each stream.
    """

    items: int
    first: PerformanceMetrics
    between: PerformanceMetrics


@dataclass(frozen=True, slots=True)
class AgentRanking:
    """One line of the ranking.

    Attributes:
        agent: its name.
        score: success rate / (average duration in s + 1).
        success_rate: 0 to 1.
        avg_execution_time: s.
    """

    agent: str
    score: float
    success_rate: float
    avg_execution_time: float

    def rendered(self) -> dict[str, Any]:
        """Return the reference's dict."""
        return {
            "agent": self.agent,
            "score": f"{self.score:.3f}",
            "success_rate": f"{self.success_rate:.1%}",
            "avg_time": f"{self.avg_execution_time:.2f}s",
        }


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """All agents at a glance.

    Attributes:
        uptime: s since the first sample, or the length of the window.
        total_tasks: executions.
        total_successes: of these, those that succeeded.
        total_failures: those that failed.
        total_cancelled: those that were cancelled.
        active_agents: agents with executions in the time covered.
        rankings: the agents, best first.
        interval: the time covered.
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
        """Return the reference's dict."""
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
    """Sum up all agents."""
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
    """How this process's records fare on their way to the server.

    ``recorded == counted + pending + dropped`` holds at every moment.

    Attributes:
        recorded: executions recorded in this process.
        counted: of these, those the server has confirmed.
        pending: those not confirmed yet.
        dropped: those given up: their agent's keys hold a foreign type.
        uncertain: those that may have been counted twice, because a request was without answer for longer than the
            server remembers its number.
        samples_dropped: raw samples that were counted, but not kept as samples.
        other: executions counted under ``__other__``.
        usage_unread: calls of models recorded with a ``usage=`` that held no token counts, so without their tokens.
        usage_inconsistent: usages with a total that is not input plus output, counted by their parts.
        last_error: what the last flush met, or None.
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
