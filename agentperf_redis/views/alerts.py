"""The alerts of a namespace with their history, silences, rules and receivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts import flows
from agentperf_redis.alerts.flows import AlertService
from agentperf_redis.alerts.model import AlertEvent, AlertState, AlertStatus, Overview, ReceiverStatus, RuleStatus
from agentperf_redis.command import Flow
from agentperf_redis.views.reading import Fault, Parts
from agentperf_redis.views.selection import Order, order_of, selected

MAX_EVENTS = 100
NO_ALERTS = Overview(0, None, (), (), ())


class AlertSort(Enum):
    """The columns by which alerts are sorted."""

    STATE = "state"
    RULE = "rule"
    TARGET = "target"
    SEVERITY = "severity"
    SINCE = "since"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class AlertsView:
    """The alerts of a namespace.

    Attributes:
        alerts: the alerts of this page, filtered and sorted; by default, firing alerts come first. An alert is the
            state of a rule for a target.
        matching: number of alerts that match the filter.
        known: number of all alerts.
        firing: number of all firing alerts.
        order: the order of the alerts.
        match: the filter, applied to ``<rule> <target>``.
        events: the latest transitions and silences, the newest first.
        rules: the deployed rules; a silenced rule has `silenced_until`.
        silences: the silenced rules.
        receivers: the receivers of notifications, without secrets.
        deployed_at: time of the deployment, s since 1970; None if no rules are deployed.
        faults: parts that could not be read.
    """

    alerts: tuple[AlertStatus, ...]
    matching: int
    known: int
    firing: int
    order: Order[AlertSort]
    match: str
    events: tuple[AlertEvent, ...]
    rules: tuple[RuleStatus, ...]
    silences: tuple[RuleStatus, ...]
    receivers: tuple[ReceiverStatus, ...]
    deployed_at: float | None
    faults: tuple[Fault, ...]


_STATES = (AlertState.FIRING, AlertState.SILENCED, AlertState.PENDING, AlertState.NO_DATA, AlertState.OK)
_VALUES: Mapping[AlertSort, Callable[[AlertStatus], Any]] = {
    AlertSort.STATE: lambda alert: _STATES.index(alert.state),
    AlertSort.RULE: lambda alert: alert.rule,
    AlertSort.TARGET: lambda alert: alert.target,
    AlertSort.SEVERITY: lambda alert: alert.severity,
    AlertSort.SINCE: lambda alert: alert.since,
    AlertSort.VALUE: lambda alert: alert.value,
}


def service_of(perf: AgentPerf) -> AlertService:
    """Return the state that the flows of alerts need."""
    return perf.alerts._service  # noqa: SLF001  the flows are not part of the public API


def alerts(
    perf: AgentPerf,
    *,
    sort: AlertSort | str = AlertSort.STATE,
    descending: bool | None = None,
    match: str = "",
    limit: int = 500,
    offset: int = 0,
) -> Flow[AlertsView]:
    """Read the alerts. The call itself checks the arguments.

    Args:
        perf: the client.
        sort: the column by which alerts are sorted.
        descending: the direction; None puts firing alerts, the newest states and the largest values first, and sorts
            names and severities upwards.
        match: part of the name of a rule or target, or a glob; empty for all.
        limit: maximum number of alerts.
        offset: number of alerts before the first one.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    upward = (AlertSort.STATE, AlertSort.RULE, AlertSort.TARGET, AlertSort.SEVERITY)
    order = order_of(sort, descending, AlertSort, upward=upward)
    selected((), _name, _VALUES, order, match, limit, offset)  # checks the arguments
    return _alerts(perf, order, match, limit, offset)


def _name(alert: AlertStatus) -> str:
    return f"{alert.rule} {alert.target}"


def _alerts(perf: AgentPerf, order: Order[AlertSort], match: str, limit: int, offset: int) -> Flow[AlertsView]:
    service = service_of(perf)
    parts = Parts(alerts=flows.overview(service), alert_log=flows.log(service, None, MAX_EVENTS))
    yield from parts.read()
    overview: Overview = parts.get("alerts", NO_ALERTS)
    found = selected(overview.alerts, _name, _VALUES, order, match, limit, offset)
    events: tuple[AlertEvent, ...] = parts.get("alert_log", ())
    return AlertsView(
        alerts=found.rows,
        matching=found.matching,
        known=found.total,
        firing=sum(alert.state is AlertState.FIRING for alert in overview.alerts),
        order=order,
        match=match,
        events=tuple(reversed(events)),
        rules=overview.rules,
        silences=tuple(rule for rule in overview.rules if rule.silenced_until is not None),
        receivers=overview.receivers,
        deployed_at=overview.deployed_at,
        faults=parts.faults,
    )


async def read_alerts(
    perf: AgentPerf,
    *,
    sort: AlertSort | str = AlertSort.STATE,
    descending: bool | None = None,
    match: str = "",
    limit: int = 500,
    offset: int = 0,
) -> AlertsView:
    """See `alerts`."""
    flow = alerts(perf, sort=sort, descending=descending, match=match, limit=limit, offset=offset)
    return await perf.backend.arun(flow)
