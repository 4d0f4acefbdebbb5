"""The asyncio version of `MetricsCollector`, which runs the same flows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from agentperf_redis.metrics import flows, workers
from agentperf_redis.metrics.comparison import Comparison, RankBy, Ranked
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.model import (
    Execution,
    PerformanceMetrics,
    StreamMetrics,
    SystemSummary,
    summaries,
    system_summary,
)
from agentperf_redis.metrics.series import SeriesRow, series
from agentperf_redis.metrics.spans import SpanReport
from agentperf_redis.metrics.workers import RunningExecution, WorkerInfo
from agentperf_redis.windows import Timestamp, Window


class AsyncMetricsCollector:
    """`MetricsCollector` for asyncio; each method does the same as its blocking counterpart."""

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher
        self._backend = flusher.backend

    async def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Timestamp = None
    ) -> PerformanceMetrics:
        """See `MetricsCollector.get_or_create_metrics`."""
        return await self._backend.arun(flows.agent(self._flusher, agent_name, window, as_of))

    async def snapshots(
        self, *, window: Window = None, as_of: Timestamp = None, percentiles: bool = True
    ) -> dict[str, PerformanceMetrics]:
        """See `MetricsCollector.snapshots`."""
        return await self._backend.arun(flows.agents(self._flusher, window, as_of, percentiles=percentiles))

    async def combined(self, *agent_names: str, window: Window = None, as_of: Timestamp = None) -> PerformanceMetrics:
        """See `MetricsCollector.combined`."""
        return await self._backend.arun(flows.combined(self._flusher, agent_names, window, as_of))

    async def recent(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """See `MetricsCollector.recent`."""
        return await self._backend.arun(flows.recent(self._flusher, agent_name, limit))

    async def slowest(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """See `MetricsCollector.slowest`."""
        return await self._backend.arun(flows.slowest(self._flusher, agent_name, limit))

    async def get_all_metrics(self, window: Window = None, as_of: Timestamp = None) -> dict[str, dict[str, Any]]:
        """See `MetricsCollector.get_all_metrics`."""
        return summaries(await self.snapshots(window=window, as_of=as_of))

    async def summary(self, *, window: Window = None, as_of: Timestamp = None) -> SystemSummary:
        """See `MetricsCollector.summary`."""
        return system_summary((await self.snapshots(window=window, as_of=as_of, percentiles=False)).values())

    async def get_system_summary(self, window: Window = None, as_of: Timestamp = None) -> dict[str, Any]:
        """See `MetricsCollector.get_system_summary`."""
        return (await self.summary(window=window, as_of=as_of)).rendered()

    async def spans(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> SpanReport:
        """See `MetricsCollector.spans`."""
        return await self._backend.arun(flows.spans(self._flusher, agent_name, window, as_of))

    async def streams(self, agent_name: str, *, window: Window = None, as_of: Timestamp = None) -> StreamMetrics:
        """See `MetricsCollector.streams`."""
        return await self._backend.arun(flows.streams(self._flusher, agent_name, window, as_of))

    @overload
    async def series(  # type: ignore[overload-overlap]  # a str is also an Iterable[str]
        self, agent_or_agents: str, *, window: Window = ..., step: Window = ..., as_of: Timestamp = ...
    ) -> tuple[SeriesRow, ...]: ...

    @overload
    async def series(
        self,
        agent_or_agents: Iterable[str] | None = ...,
        *,
        window: Window = ...,
        step: Window = ...,
        as_of: Timestamp = ...,
    ) -> dict[str, tuple[SeriesRow, ...]]: ...

    async def series(
        self,
        agent_or_agents: str | Iterable[str] | None = None,
        *,
        window: Window = "1h",
        step: Window = "1m",
        as_of: Timestamp = None,
    ) -> tuple[SeriesRow, ...] | dict[str, tuple[SeriesRow, ...]]:
        """See `MetricsCollector.series`."""
        return await self._backend.arun(series(self._flusher, agent_or_agents, window=window, step=step, as_of=as_of))

    async def rank(
        self,
        by: RankBy | str = RankBy.SCORE,
        *,
        window: Window = None,
        as_of: Timestamp = None,
        min_tasks: int = 1,
    ) -> tuple[Ranked, ...]:
        """See `MetricsCollector.rank`."""
        return await self._backend.arun(flows.rank(self._flusher, by, window, as_of, min_tasks))

    async def compare(
        self,
        agent_name: str,
        other: str | None = None,
        *,
        window: Window = None,
        as_of: Timestamp = None,
        other_window: Window = None,
        other_as_of: Timestamp = None,
    ) -> Comparison:
        """See `MetricsCollector.compare`."""
        return await self._backend.arun(
            flows.compare(self._flusher, (agent_name, window, as_of), (other, other_window, other_as_of))
        )

    async def workers(self) -> tuple[WorkerInfo, ...]:
        """See `MetricsCollector.workers`."""
        return await self._backend.arun(workers.workers(self._flusher))

    async def running(self, agent: str | None = None) -> tuple[RunningExecution, ...]:
        """See `MetricsCollector.running`."""
        return await self._backend.arun(workers.running(self._flusher, agent))

    async def forget(self, agent_name: str) -> bool:
        """See `MetricsCollector.forget`."""
        return await self._backend.arun(flows.forget(self._flusher, agent_name))

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  as in the blocking method
        """See `MetricsCollector.flush`."""
        return await self._backend.arun(flows.flush(self._flusher, timeout))
