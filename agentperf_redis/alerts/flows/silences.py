"""Silencing rules for a time."""

from __future__ import annotations

import fnmatch

from agentperf_redis import arguments
from agentperf_redis.alerts import commands
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.rules_file import SEVERITIES_OF_SLO
from agentperf_redis.alerts.transitions import event_id
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.windows import Timestamp, timestamp_ms, window_seconds


def silence(service: AlertService, rule: str, seconds: str | float, as_of: Timestamp) -> Flow[float]:
    """Silence rules. Returns the end of the silence, s since 1970."""
    checked = window_seconds(seconds, "seconds")
    as_of_ms = -1 if as_of is None else timestamp_ms("as_of", as_of)
    return _silence(service, arguments.name("rule", rule), round(checked * 1000), as_of_ms)


def unsilence(service: AlertService, rule: str) -> Flow[float]:
    """End the silence of rules. Returns the present time of the server, s since 1970."""
    return _silence(service, arguments.name("rule", rule), 0, -1)


def _silence(service: AlertService, rule: str, for_ms: int, as_of_ms: int) -> Flow[float]:
    deployed = yield from service.deployed()
    names = [each.name for each in deployed.rules.rules]
    chosen = [name for name in names if is_meant(rule, name)]
    found: list[str] = []
    until_ms = 0
    if chosen:
        event = event_id(max(0, as_of_ms))
        until_ms, found = yield from commands.silence(
            service.keys, chosen, for_ms=for_ms, as_of_ms=as_of_ms, event=event
        )
    if not found:
        shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")  # noqa: PLR2004  names shown
        raise InvalidArgument("rule", rule, f"the name of a deployed rule, or a glob: {shown or 'none is deployed'}")
    return until_ms / 1000


def is_meant(pattern: str, name: str) -> bool:
    """Whether a pattern selects a rule: the pattern is the rule's name, the name of its SLO, or a matching glob."""
    return (
        name == pattern
        or any(name == f"{pattern} ({severity})" for severity in SEVERITIES_OF_SLO)
        or fnmatch.fnmatchcase(name, pattern)
    )
