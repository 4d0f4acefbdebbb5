"""The public API of alerts: `perf.alerts`. Its asyncio methods are in `Alerts.aio`."""

from __future__ import annotations

import os
from functools import cached_property

from agentperf_redis.alerts import backtest, flows
from agentperf_redis.alerts.async_client import AsyncAlerts
from agentperf_redis.alerts.evaluator import Evaluator
from agentperf_redis.alerts.flows import AlertService, Deployment
from agentperf_redis.alerts.model import AlertEvent, Evaluated, Overview, Replay
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.windows import Timestamp


class Alerts:
    """Rules on agents, caches and pools, shared by all processes of a namespace.

    Rules are written in a TOML file, which is deployed to the server. Any number of processes evaluate the rules (see
    `run`), and share the work. States, transitions and notifications are stored on the server.

    Args:
        backend: the server and namespace; None takes the process-wide default.
    """

    def __init__(self, *, backend: Backend | None = None) -> None:
        self._backend = chosen_backend(backend)
        flusher = self._backend.share("metrics.flusher", lambda: Flusher(self._backend))
        self._service = self._backend.share("alerts.service", lambda: AlertService(self._backend, flusher))

    def __repr__(self) -> str:
        return f"Alerts(backend={self._backend!r})"

    @cached_property
    def aio(self) -> AsyncAlerts:
        """The same alerts for asyncio: every call with I/O is awaited."""
        return AsyncAlerts(self._service)

    def deploy(self, path: str | os.PathLike[str] | None = None, *, text: str | None = None) -> Deployment:
        """Check a rules file as a whole, and replace all deployed rules by its rules in one step.

        Rules that keep their name keep their states.

        Args:
            path: the rules file.
            text: the text of a rules file, in place of `path`.

        Raises:
            InvalidRules: with all faults of the file. Nothing was deployed.
            AgentPerfError: if the server cannot be reached, or a key holds data that this library did not write.
        """
        return self._backend.run(flows.deploy(self._service, path, text))

    def list(self) -> Overview:
        """Return all rules, the states of their targets, and the receivers, without secrets."""
        return self._backend.run(flows.overview(self._service))

    def evaluate(self, *, as_of: Timestamp = None) -> Evaluated:
        """Evaluate once the rules that are due now. `run` evaluates rules continually, and delivers notifications.

        Args:
            as_of: evaluate as of this time: a datetime (local time if it has no zone), or seconds since 1970. None:
                two seconds ago, so that the records of all processes have arrived.
        """
        return self._backend.run(flows.evaluate(self._service, as_of))

    def run(self) -> Evaluator:
        """Evaluate rules and deliver notifications on a background thread until stopped.

        Any number of processes may run this: they share the rules without a leader. If the server cannot be reached,
        the processes wait. An outage alone neither fires nor resolves an alert.

        Returns:
            The evaluator. It ends with `stop()`, at the end of a `with` block, or when the client closes.
        """
        return Evaluator(self._service)

    def test(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        text: str | None = None,
        since: str | float = "24h",
        as_of: Timestamp = None,
    ) -> Replay:
        """Replay rules over the past without deploying them, and find when each would have fired, and for how long.

        A replay judges the slices of metrics that the server still holds. These slices may be wider than the slices
        that the live evaluation uses. The result names the rules for which this is so. Rules on caches and pools are
        judged on samples. The processes that use the cache or pool take a sample every ten seconds. A replay uses the
        last sample in each interval of evaluation.

        Args:
            path: the rules file.
            text: the text of a rules file, in place of `path`.
            since: length of the time range: seconds, or ``"6h"``, ``"24h"``, ``"3d"``.
            as_of: end of the time range; None for now.

        Raises:
            InvalidRules: with all faults of the file.
            InvalidArgument: for an invalid time range.
            AgentPerfError: as `deploy`.
        """
        return self._backend.run(backtest.replay(self._service, path, text, since, as_of))

    def silence(self, rule: str, seconds: str | float, *, as_of: Timestamp = None) -> float:
        """Send no notifications of some rules for a time. The rules are still evaluated.

        If an alert begins to fire during the silence and still fires when the silence ends, its notification is sent
        when the silence ends. If the notification of an alert was sent before the silence, and the alert is resolved
        during the silence, the notification of its end is sent at once.

        Args:
            rule: name of a rule or an SLO, or a glob.
            seconds: length of the silence, in seconds or as ``"30m"``, ``"2h"``, ``"1d"``.
            as_of: start of the silence; None for now.

        Returns:
            The end of the silence, s since 1970.

        Raises:
            InvalidArgument: for an invalid length, and if no deployed rule has this name.
        """
        return self._backend.run(flows.silence(self._service, rule, seconds, as_of))

    def unsilence(self, rule: str) -> float:
        """End the silence of rules. Returns the present time, s since 1970. Argument and errors: see `silence`."""
        return self._backend.run(flows.unsilence(self._service, rule))

    def log(self, rule: str | None = None, *, limit: int = 100) -> tuple[AlertEvent, ...]:
        """Return the last transitions and silences, oldest first. The server keeps about the last five thousand.

        Args:
            rule: return only the events of this rule or SLO, or of the rules that match this glob; None for all.
            limit: max number of events, 1 to 5000.
        """
        return self._backend.run(flows.log(self._service, rule, limit))
