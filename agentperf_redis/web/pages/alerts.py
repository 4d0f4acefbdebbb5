"""The page of alerts: firing ones first, then history, silences, rules and receivers."""

from __future__ import annotations

from typing import Any, Final

from agentperf_redis.alerts.expression import Scope, parsed, value_text
from agentperf_redis.alerts.model import AlertState
from agentperf_redis.alerts.targets import cache_of_target
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.web.pages.asked import PAGE_ROWS, Asked
from agentperf_redis.web.pages.rendering import Page
from agentperf_redis.web.pages.text import NONE

STATES: Final = {
    AlertState.FIRING: "bad",
    AlertState.PENDING: "warn",
    AlertState.NO_DATA: "warn",
    AlertState.OK: "good",
}
"""How each state looks. A silenced alert is missing here, because it looks neutral."""

SCOPES: Final = {"agents": "agent", "agent": "agent", "cache": "cache", "pool": "pool"}
"""Scope of a rule -> the route of its target's page."""


async def alerts(views: Any, asked: Asked) -> Page:
    """All alerts."""
    view = await views.alerts(**asked.rows)
    values = {
        "view": view,
        "order": view.order,
        "match": view.match,
        "first": asked.page * PAGE_ROWS,
        "page": asked.page,
        "state_class": {state: STATES.get(state, "") for state in AlertState},
        "scopes": SCOPES,
        "named": named,
        "measured": measured,
        "evaluated": max((rule.judged_at for rule in view.rules if rule.judged_at is not None), default=None),
        "scope_of": {rule.name: rule.scope for rule in view.rules},
        "when_of": {rule.name: rule.when for rule in view.rules},
    }
    return Page("alerts.html", "Alerts", values, windowed=False)


def named(target: str, scope: str) -> dict[str, str]:
    """Return the parameters of the address of a target's page."""
    if scope != Scope.CACHE.value:
        return {"name": target}
    name, kind = cache_of_target(target)
    return {"name": name, "kind": kind}


def measured(value: float | None, when: str, scope: str) -> str:
    """Return a value with the unit of the measure in its condition, such as ``p95 > 2s``."""
    if value is None:
        return NONE
    try:
        condition = parsed("when", when, Scope(scope))
    except (InvalidArgument, ValueError):  # `when` is a burn rate, or empty because the rule is no longer deployed
        return f"{value:.3g}"
    return value_text(condition.measure, value, is_relative=condition.is_relative)
