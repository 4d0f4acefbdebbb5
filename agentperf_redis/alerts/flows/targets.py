"""Reading what rules watch, and judging it: agents, caches and pools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agentperf_redis.alerts.expression import Scope
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.model import (
    TargetState,
)
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.targets import cache_target
from agentperf_redis.alerts.values import Judged, judged_agent, judged_cache, judged_pool, totals_of
from agentperf_redis.cache.flows.inspection import read_all_stats
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.metrics import flows as metrics_flows
from agentperf_redis.metrics.model import OTHER, PerformanceMetrics

MAX_TARGETS = 2500
"""Max targets of one rule: the first ones by name are judged. A namespace has at most some 2500 agents."""


def judged_targets(
    service: AlertService,
    due: list[tuple[Rule, int]],
    states: Mapping[str, Mapping[str, TargetState]],
    errors: list[AgentPerfError],
) -> Flow[dict[str, dict[str, Judged]]]:
    """Read the values that rules watch, and judge them. Rules whose values cannot be read are left out.

    Returns the verdicts and values by rule and target.
    """
    found: dict[str, dict[str, Judged]] = {}
    agents = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.AGENTS]
    if agents:
        names = yield from metrics_flows.agent_names(service.flusher)
        found |= yield from _judged_agents(service, agents, names, errors)
    caches = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.CACHE]
    if caches:
        try:
            all_stats = yield from read_all_stats(service.backend)
        except AgentPerfError as error:
            _collect(errors, error)
        else:
            for rule, at_ms in caches:
                known = states[rule.name]
                by_name = {cache_target(each.kind, each.name): each for each in all_stats if rule.matches(each.name)}
                found[rule.name] = {
                    name: judged_cache(rule, stats, known[name].samples if name in known else "", at_ms)
                    for name, stats in sorted(by_name.items())[:MAX_TARGETS]
                }
    pools = [(rule, at_ms) for rule, at_ms in due if rule.scope is Scope.POOL]
    if pools:
        try:
            all_pools = yield from service.balancer._operations.status(())  # noqa: SLF001  `status` runs this flow
        except AgentPerfError as error:
            _collect(errors, error)
        else:
            for rule, at_ms in pools:
                matching = sorted((each for each in all_pools if rule.matches(each.agent_type)), key=_name_of_pool)
                found[rule.name] = {each.agent_type: judged_pool(rule, each, at_ms) for each in matching[:MAX_TARGETS]}
    return found


def _name_of_pool(pool: object) -> str:
    return str(getattr(pool, "agent_type", ""))


def _judged_agents(
    service: AlertService, due: list[tuple[Rule, int]], names: list[str], errors: list[AgentPerfError]
) -> Flow[dict[str, dict[str, Judged]]]:
    targets = {rule.name: matching(rule, names) for rule, _ in due}
    wanted: dict[tuple[float, int], set[str]] = {}
    for rule, at_ms in due:
        for window in rule.windows:
            wanted.setdefault((window, at_ms), set()).update(targets[rule.name])
    read: dict[tuple[float, int], dict[str, PerformanceMetrics]] = {}
    for (window, at_ms), agents in wanted.items():
        try:
            read[window, at_ms] = yield from metrics_flows.chosen(service.flusher, sorted(agents), window, at_ms / 1000)
        except AgentPerfError as error:
            _collect(errors, error)
    found = {}
    for rule, at_ms in due:
        if all((window, at_ms) in read for window in rule.windows):
            found[rule.name] = {
                name: judged_agent(rule, {window: totals_of(read[window, at_ms][name]) for window in rule.windows})
                for name in targets[rule.name]
            }
    return found


def matching(rule: Rule, names: Iterable[str]) -> list[str]:
    """Return the agents that a rule watches, without `__other__`, the name that agents beyond the limit share."""
    return [name for name in names if rule.matches(name) and name != OTHER][:MAX_TARGETS]


def _collect(errors: list[AgentPerfError], error: AgentPerfError) -> None:
    """Keep the error of one read, so that the other rules are evaluated. Raise it if the server is unreachable."""
    if isinstance(error, BackendUnavailable):
        raise error
    errors.append(error)
