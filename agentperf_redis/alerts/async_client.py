"""The asyncio version of `Alerts`. Both versions run the same flows."""

from __future__ import annotations

import os

from agentperf_redis.alerts import backtest, flows
from agentperf_redis.alerts.evaluator import run
from agentperf_redis.alerts.flows import AlertService, Deployment
from agentperf_redis.alerts.model import AlertEvent, Evaluated, Overview, Replay
from agentperf_redis.windows import Timestamp


class AsyncAlerts:
    """`Alerts` for asyncio; each method does the same as its blocking counterpart."""

    def __init__(self, service: AlertService) -> None:
        self._service = service
        self._backend = service.backend

    async def deploy(self, path: str | os.PathLike[str] | None = None, *, text: str | None = None) -> Deployment:
        """See `Alerts.deploy`."""
        return await self._backend.arun(flows.deploy(self._service, path, text))

    async def list(self) -> Overview:
        """See `Alerts.list`."""
        return await self._backend.arun(flows.overview(self._service))

    async def evaluate(self, *, as_of: Timestamp = None) -> Evaluated:
        """See `Alerts.evaluate`."""
        return await self._backend.arun(flows.evaluate(self._service, as_of))

    async def run(self) -> None:
        """See `Alerts.run`. Runs until the task is cancelled."""
        await run(self._service)

    async def test(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        text: str | None = None,
        since: str | float = "24h",
        as_of: Timestamp = None,
    ) -> Replay:
        """See `Alerts.test`."""
        return await self._backend.arun(backtest.replay(self._service, path, text, since, as_of))

    async def silence(self, rule: str, seconds: str | float, *, as_of: Timestamp = None) -> float:
        """See `Alerts.silence`."""
        return await self._backend.arun(flows.silence(self._service, rule, seconds, as_of))

    async def unsilence(self, rule: str) -> float:
        """See `Alerts.unsilence`."""
        return await self._backend.arun(flows.unsilence(self._service, rule))

    async def log(self, rule: str | None = None, *, limit: int = 100) -> tuple[AlertEvent, ...]:
        """See `Alerts.log`."""
        return await self._backend.arun(flows.log(self._service, rule, limit))
