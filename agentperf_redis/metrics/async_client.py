"""`MetricsCollector` for asyncio: the same flows, awaited."""

from __future__ import annotations

from typing import Any

from agentperf_redis.metrics import flows
from agentperf_redis.metrics.comparison import Comparison, RankBy, Ranked
from agentperf_redis.metrics.flusher import Recorder
from agentperf_redis.metrics.model import (
    Execution,
    PerformanceMetrics,
    StreamMetrics,
    SystemSummary,
    summaries,
    system_summary,
)
from agentperf_redis.metrics.spans import SpanReport
from agentperf_redis.metrics.windows import Moment, Window


class AsyncMetricsCollector:
    """`MetricsCollector` for asyncio; each call does what the call of that name does there."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._backend = recorder.backend

    async def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Moment = None
    ) -> PerformanceMetrics:
        """See `MetricsCollector.get_or_create_metrics`."""
        return await self._backend.arun(flows.agent(self._recorder, agent_name, window, as_of))

    async def snapshots(
        self, *, window: Window = None, as_of: Moment = None, percentiles: bool = True
    ) -> dict[str, PerformanceMetrics]:
        """See `MetricsCollector.snapshots`."""
        return await self._backend.arun(flows.agents(self._recorder, window, as_of, percentiles=percentiles))

    async def combined(self, *agent_names: str, window: Window = None, as_of: Moment = None) -> PerformanceMetrics:
        """See `MetricsCollector.combined`."""
        return await self._backend.arun(flows.combined(self._recorder, agent_names, window, as_of))

    async def recent(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """See `MetricsCollector.recent`."""
        return await self._backend.arun(flows.recent(self._recorder, agent_name, limit))

    async def slowest(self, agent_name: str, *, limit: int = 20) -> tuple[Execution, ...]:
        """See `MetricsCollector.slowest`."""
        return await self._backend.arun(flows.slowest(self._recorder, agent_name, limit))

    async def get_all_metrics(self, window: Window = None, as_of: Moment = None) -> dict[str, dict[str, Any]]:
        """See `MetricsCollector.get_all_metrics`."""
        return summaries(await self.snapshots(window=window, as_of=as_of))

    async def summary(self, *, window: Window = None, as_of: Moment = None) -> SystemSummary:
        """See `MetricsCollector.summary`."""
        return system_summary((await self.snapshots(window=window, as_of=as_of, percentiles=False)).values())

    async def get_system_summary(self, window: Window = None, as_of: Moment = None) -> dict[str, Any]:
        """See `MetricsCollector.get_system_summary`."""
        return (await self.summary(window=window, as_of=as_of)).rendered()

    async def spans(self, agent_name: str, *, window: Window = None, as_of: Moment = None) -> SpanReport:
        """See `MetricsCollector.spans`."""
        return await self._backend.arun(flows.spans(self._recorder, agent_name, window, as_of))

    async def streams(self, agent_name: str, *, window: Window = None, as_of: Moment = None) -> StreamMetrics:
        """See `MetricsCollector.streams`."""
        return await self._backend.arun(flows.streams(self._recorder, agent_name, window, as_of))

    async def rank(
        self,
        by: RankBy | str = RankBy.SCORE,
        *,
        window: Window = None,
        as_of: Moment = None,
        least_tasks: int = 1,
    ) -> tuple[Ranked, ...]:
        """See `MetricsCollector.rank`."""
        return await self._backend.arun(flows.rank(self._recorder, by, window, as_of, least_tasks))

    async def compare(
        self,
        agent_name: str,
        other: str | None = None,
        *,
        window: Window = None,
        as_of: Moment = None,
        other_window: Window = None,
        other_as_of: Moment = None,
    ) -> Comparison:
        """See `MetricsCollector.compare`."""
        return await self._backend.arun(
            flows.compare(self._recorder, (agent_name, window, as_of), (other, other_window, other_as_of))
        )

    async def forget(self, agent_name: str) -> bool:
        """See `MetricsCollector.forget`."""
        return await self._backend.arun(flows.forget(self._recorder, agent_name))

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  the same argument as of the blocking method
        """See `MetricsCollector.flush`."""
        return await self._backend.arun(flows.flush(self._recorder, timeout))
