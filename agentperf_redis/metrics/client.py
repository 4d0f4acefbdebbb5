"""`MetricsCollector`: what users meet, blocking and asyncio side by side."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, default_backend
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics import flows
from agentperf_redis.metrics.buffer import CANCELLED, FAILED, OK
from agentperf_redis.metrics.model import (
    Delivery,
    PerformanceMetrics,
    Retention,
    SystemSummary,
    system_summary,
)
from agentperf_redis.metrics.recorder import Recorder

Window = str | float | None
Moment = datetime | float | None

_LONGEST_S = 366 * 86_400.0
_DURATION_ALLOWED = "seconds from 0 to 31622400 (a year)"
_KNOWN_ERRORS_MOST = 4096


class MetricsCollector:
    """Metrics of agents, shared by all processes of a namespace.

    Recording never waits for the server: it is a list append, and a thread brings the sums there every second. Reading
    first flushes what this process has recorded. Percentiles are exact while the server holds all raw samples of what
    is asked (1000 an agent), and within 2.17 % beyond; `PerformanceMetrics.exact` says which.

    Args:
        backend: the namespace; None takes the process-wide default.
    """

    def __init__(self, *, backend: Backend | None = None) -> None:
        self._backend = backend if backend is not None else default_backend()
        self._recorder = self._backend.share("metrics.recorder", lambda: Recorder(self._backend, Retention()))
        self._record = self._recorder.buffer.record
        self._outcomes: dict[str | None, str] = {None: FAILED, "": FAILED}
        self.start_time = datetime.now()  # noqa: DTZ005  the reference's attribute: naive local time

    def __repr__(self) -> str:
        return f"MetricsCollector(backend={self._backend!r})"

    @cached_property
    def aio(self) -> AsyncMetricsCollector:
        """The asyncio twin, over the same state."""
        return AsyncMetricsCollector(self._recorder)

    def record_execution(
        self, agent_name: str, execution_time: float, success: bool, error_type: str | None = None
    ) -> None:
        """Record an execution. Takes about a microsecond and does no I/O.

        Args:
            agent_name: the agent, 1 to 200 characters.
            execution_time: s, 0 to a year; kept to 1 us.
            success: whether it succeeded.
            error_type: of a failure, 1 to 200 characters, or None.

        Raises:
            InvalidArgument: for anything else; nothing is recorded.
        """
        if type(execution_time) is not float or not 0.0 <= execution_time <= _LONGEST_S:
            execution_time = _duration(execution_time)
        if success is True:
            self._record(agent_name, int(execution_time * 1e6 + 0.5), OK)
        elif success is False:
            try:
                outcome = self._outcomes[error_type]
            except (KeyError, TypeError):
                outcome = self._failure(error_type)
            self._record(agent_name, int(execution_time * 1e6 + 0.5), outcome)
        else:
            arguments.flag("success", success)

    def record_cancellation(self, agent_name: str, execution_time: float) -> None:
        """Record an execution that was cancelled: neither a success nor a failure.

        Args:
            agent_name: the agent.
            execution_time: s.
        """
        self._record(agent_name, int(_duration(execution_time) * 1e6 + 0.5), CANCELLED)

    def _failure(self, error_type: object) -> str:
        name = arguments.name("error_type", error_type)
        if len(self._outcomes) >= _KNOWN_ERRORS_MOST:
            return f"{FAILED}:{name}"
        return self._outcomes.setdefault(name, f"{FAILED}:{name}")

    def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Moment = None
    ) -> PerformanceMetrics:
        """Return the metrics of one agent; counts of zero when nothing was recorded.

        Args:
            agent_name: the agent.
            window: None for all time, or the last seconds or ``"30s"``, ``"5m"``, ``"1h"``, ``"3d"``.
            as_of: the end of the window: a datetime, or s since 1970; None is now.

        Returns:
            A frozen snapshot; reading again gives a new one.

        Raises:
            InvalidArgument: for a name, window or moment that cannot be.
            AgentPerfError: if the server cannot be reached, or holds something else under these keys.
        """
        return self._backend.run(flows.agent(self._recorder, agent_name, window, as_of))

    def snapshots(self, *, window: Window = None, as_of: Moment = None) -> dict[str, PerformanceMetrics]:
        """Return the metrics of all agents, sorted by name. Arguments as for `get_or_create_metrics`."""
        return self._backend.run(flows.agents(self._recorder, window, as_of))

    @property
    def metrics(self) -> dict[str, PerformanceMetrics]:
        """The metrics of all agents, of all time: the reference's attribute, read anew each time."""
        return self.snapshots()

    def get_all_metrics(self, window: Window = None, as_of: Moment = None) -> dict[str, dict[str, Any]]:
        """Return the summary of each agent, as the reference renders it. Arguments as for `get_or_create_metrics`."""
        return _rendered(self._backend.run(flows.agents(self._recorder, window, as_of)))

    def summary(self, *, window: Window = None, as_of: Moment = None) -> SystemSummary:
        """Return all agents at a glance. Arguments as for `get_or_create_metrics`."""
        return system_summary(self._backend.run(flows.agents(self._recorder, window, as_of)).values())

    def get_system_summary(self, window: Window = None, as_of: Moment = None) -> dict[str, Any]:
        """Return all agents at a glance, as the reference renders it. Uptime counts from the first sample."""
        return self.summary(window=window, as_of=as_of).rendered()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded in this process is counted.

        Args:
            timeout: s; None waits as long as the server's deadlines allow.

        Returns:
            Whether all is counted; False when the time was over before. What is not counted is kept and tried again.

        Raises:
            AgentPerfError: what the flush met.
        """
        return self._backend.run(flows.flush(self._recorder, timeout))

    def delivery(self) -> Delivery:
        """Return how this process's records fare on their way to the server. No I/O."""
        return self._recorder.delivery_state()


class AsyncMetricsCollector:
    """The asyncio twin of `MetricsCollector`, over the same state: ``await collector.aio.get_all_metrics()``."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._backend = recorder.backend

    async def get_or_create_metrics(
        self, agent_name: str, *, window: Window = None, as_of: Moment = None
    ) -> PerformanceMetrics:
        """Do as `MetricsCollector.get_or_create_metrics`."""
        return await self._backend.arun(flows.agent(self._recorder, agent_name, window, as_of))

    async def snapshots(self, *, window: Window = None, as_of: Moment = None) -> dict[str, PerformanceMetrics]:
        """Do as `MetricsCollector.snapshots`."""
        return await self._backend.arun(flows.agents(self._recorder, window, as_of))

    async def get_all_metrics(self, window: Window = None, as_of: Moment = None) -> dict[str, dict[str, Any]]:
        """Do as `MetricsCollector.get_all_metrics`."""
        return _rendered(await self.snapshots(window=window, as_of=as_of))

    async def summary(self, *, window: Window = None, as_of: Moment = None) -> SystemSummary:
        """Do as `MetricsCollector.summary`."""
        return system_summary((await self.snapshots(window=window, as_of=as_of)).values())

    async def get_system_summary(self, window: Window = None, as_of: Moment = None) -> dict[str, Any]:
        """Do as `MetricsCollector.get_system_summary`."""
        return (await self.summary(window=window, as_of=as_of)).rendered()

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  the blocking twin's argument
        """Do as `MetricsCollector.flush`."""
        return await self._backend.arun(flows.flush(self._recorder, timeout))


def _rendered(agents: dict[str, PerformanceMetrics]) -> dict[str, dict[str, Any]]:
    return {name: agent.get_summary() for name, agent in agents.items()}


def _duration(value: object) -> float:
    seconds = arguments.number("execution_time", value, _DURATION_ALLOWED)
    if not 0.0 <= seconds <= _LONGEST_S:
        raise InvalidArgument("execution_time", value, _DURATION_ALLOWED)
    return seconds
