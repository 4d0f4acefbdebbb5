"""Records as CSV or NDJSON: one line for each agent or execution, the same fields in both formats."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from typing import IO, Any

from agentperf_redis.metrics.model import Execution, PerformanceMetrics

Record = Mapping[str, Any]

AGENT_FIELDS = (
    *("agent", "start", "end", "tasks", "successes", "failures", "cancelled", "success_rate", "throughput_per_s"),
    *("avg_s", "min_s", "p50_s", "p95_s", "p99_s", "max_s", "total_s", "percentiles_exact", "error_bound"),
    *("llm_calls", "tool_calls", "tokens_in", "tokens_out", "tokens_cached_in", "tokens_cache_write"),
    *("tokens_reasoning", "cost", "last_execution", "errors"),
)
EXECUTION_FIELDS = ("agent", "ended", "seconds", "outcome", "error")


def of_agent(agent: PerformanceMetrics) -> Record:
    """Return the fields of an agent. `start` and `end` of the time range are in s since 1970. Durations are in s."""
    values = (
        *(agent.agent_name, agent.interval.start, agent.interval.end),
        *(agent.task_count, agent.success_count, agent.failure_count, agent.cancelled_count),
        *(agent.success_rate, agent.throughput),
        *(agent.avg_execution_time, agent.min_execution_time if agent.task_count else None),
        *(agent.p50_execution_time, agent.p95_execution_time, agent.p99_execution_time),
        *(agent.max_execution_time, agent.total_execution_time, agent.exact, agent.error_bound),
        *(agent.llm_calls, agent.tool_calls, agent.tokens_in, agent.tokens_out),
        *(agent.tokens_cached_in, agent.tokens_cache_write, agent.tokens_reasoning, agent.cost),
        None if agent.last_execution is None else agent.last_execution.astimezone().isoformat(),
        dict(agent.error_types),
    )
    return dict(zip(AGENT_FIELDS, values, strict=True))


def of_execution(agent: str, execution: Execution) -> Record:
    """Return the fields of an execution; `ended` is in the time zone of this machine."""
    outcome = "success" if execution.success else "cancelled" if execution.cancelled else "failure"
    values = (agent, execution.ended.astimezone().isoformat(), execution.seconds, outcome, execution.error_type)
    return dict(zip(EXECUTION_FIELDS, values, strict=True))


def write_csv(records: Iterable[Record], fields: tuple[str, ...], file: IO[str]) -> None:
    """Write a header line and one line for each record. A missing value is empty, and a mapping is JSON."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(fields)
    for record in records:
        writer.writerow([_cell(record[name]) for name in fields])


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def write_ndjson(records: Iterable[Record], file: IO[str]) -> None:
    """Write one JSON object a line."""
    for record in records:
        file.write(json.dumps(finite(record), ensure_ascii=False) + "\n")


def finite(record: Record) -> Record:
    """Return a record with None for infinite values and NaN, which JSON cannot represent."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
