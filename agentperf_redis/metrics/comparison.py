"""Ranking of agents, and comparison of two agents or of one agent in two time ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from agentperf_redis.metrics.model import PerformanceMetrics


class RankBy(Enum):
    """Figures by which agents are ranked. The largest value comes first."""

    SCORE = "score"
    """As in the in-memory version: success rate / (average duration + 1)."""
    P95 = "p95"
    AVERAGE = "average"
    TOTAL_TIME = "total_time"
    TASKS = "tasks"
    ERROR_RATE = "error_rate"
    ERRORS = "errors"
    COST = "cost"
    TOKENS = "tokens"


_VALUES: dict[RankBy, Callable[[PerformanceMetrics], float]] = {
    RankBy.SCORE: lambda agent: agent.score,
    RankBy.P95: lambda agent: agent.p95_execution_time,
    RankBy.AVERAGE: lambda agent: agent.avg_execution_time,
    RankBy.TOTAL_TIME: lambda agent: agent.total_execution_time,
    RankBy.TASKS: lambda agent: agent.task_count,
    RankBy.ERROR_RATE: lambda agent: agent.failure_rate,
    RankBy.ERRORS: lambda agent: agent.failure_count,
    RankBy.COST: lambda agent: agent.cost,
    RankBy.TOKENS: lambda agent: agent.tokens_in + agent.tokens_out,
}


@dataclass(frozen=True, slots=True)
class Ranked:
    """An agent in a ranking.

    Attributes:
        value: the figure by which the agent was ranked.
        metrics: metrics of the agent.
    """

    value: float
    metrics: PerformanceMetrics


def ranked(agents: Iterable[PerformanceMetrics], by: RankBy, min_tasks: int = 1) -> tuple[Ranked, ...]:
    """Rank agents by a value, the largest first. Agents with equal values are sorted by name.

    Args:
        agents: the agents.
        by: the figure to rank by.
        min_tasks: agents with fewer executions are omitted, so that an agent with one lucky execution does not lead.
            This limit is ignored for cost and tokens.
    """
    if by in (RankBy.COST, RankBy.TOKENS):
        min_tasks = 0
    value = _VALUES[by]
    found = [Ranked(float(value(agent)), agent) for agent in agents if agent.task_count >= min_tasks]
    return tuple(sorted(found, key=lambda entry: (-entry.value, entry.metrics.agent_name)))


@dataclass(frozen=True, slots=True)
class Change:
    """One figure, compared between two sides.

    Attributes:
        name: name of the figure, such as ``p95_execution_time``.
        first: its value on the first side.
        second: its value on the second side.
        certain: whether the values certainly differ. It is False if they are equal, or if they are estimated
            percentiles whose error bounds overlap. It is also False for rates and durations if one side had no
            executions.
    """

    name: str
    first: float
    second: float
    certain: bool

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def ratio(self) -> float | None:
        """The second value divided by the first; None if the first is zero."""
        return self.second / self.first if self.first else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two agents, or one agent in two time ranges.

    Attributes:
        first: the baseline.
        second: the side that is compared with the baseline.
        changes: the figures of both sides.
    """

    first: PerformanceMetrics
    second: PerformanceMetrics
    changes: tuple[Change, ...]

    def __getitem__(self, name: str) -> Change:
        """Return the change of the figure with this name."""
        for change in self.changes:
            if change.name == name:
                return change
        raise KeyError(name)


_COUNTED = ("task_count", "throughput")
_EXACT = (
    "success_rate",
    "failure_rate",
    "avg_execution_time",
    "min_execution_time",
    "max_execution_time",
)
_ESTIMATED = ("p50_execution_time", "p95_execution_time", "p99_execution_time")
_PER_TASK = (
    *("tokens_in", "tokens_out", "tokens_cached_in", "tokens_cache_write", "tokens_reasoning"),
    *("cost", "llm_calls", "tool_calls"),
)


def compared(first: PerformanceMetrics, second: PerformanceMetrics) -> Comparison:
    """Compare two sides. Tokens, cost and calls are compared per execution, under names like ``cost_per_task``."""
    both = first.task_count > 0 and second.task_count > 0
    changes = [_exact(name, getattr(first, name), getattr(second, name)) for name in _COUNTED]
    changes += [_exact(name, getattr(first, name), getattr(second, name), both) for name in _EXACT]
    for name in _ESTIMATED:
        one, other = getattr(first, name), getattr(second, name)
        # Both values are estimates. The exact percentile of a side may differ from its estimate by up to the side's
        # relative error bound.
        low, high = sorted((one, other))
        (low_bound, high_bound) = (
            (first.error_bound, second.error_bound) if one <= other else (second.error_bound, first.error_bound)
        )
        certain = both and low * (1 + low_bound) < high * (1 - high_bound)
        changes.append(Change(name, one, other, certain))
    changes += [_exact(f"{name}_per_task", _per_task(first, name), _per_task(second, name), both) for name in _PER_TASK]
    return Comparison(first, second, tuple(changes))


def _exact(name: str, first: float, second: float, known: bool = True) -> Change:
    return Change(name, float(first), float(second), known and first != second)


def _per_task(metrics: PerformanceMetrics, name: str) -> float:
    value: float = getattr(metrics, name)
    return value / metrics.task_count if metrics.task_count else 0.0
