"""The state that the alerts of a process share."""

from __future__ import annotations

from agentperf_redis import keys
from agentperf_redis.alerts import commands
from agentperf_redis.alerts.commands import Deployed
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.command import Flow
from agentperf_redis.metrics.flusher import Flusher


class AlertService:
    """The state that the alerts of a process share: the server, the keys, and a copy of the deployed rules.

    Args:
        backend: the server and namespace.
        flusher: the metrics of this process.
    """

    def __init__(self, backend: Backend, flusher: Flusher) -> None:
        self.backend = backend
        self.flusher = flusher
        self.keys = keys.alerts(backend.namespace)
        self.balancer = LoadBalancer(backend=backend)
        self.version: int | None = None
        """Number of the latest deployment that this process has read; None before the first read."""
        self._known: Deployed | None = None

    def deployed(self, version: int | None = None) -> Flow[Deployed]:
        """Return the deployed rules. They are read from the server unless this process has a copy of this version."""
        known = self._known
        if known is None or version is None or known.version != version:
            known = self._known = yield from commands.rules(self.keys)
        self.version = known.version
        return known
