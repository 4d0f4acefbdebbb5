from __future__ import annotations

import csv
import io
import json
from datetime import datetime

from agentperf_redis.export.records import (
    AGENT_FIELDS,
    EXECUTION_FIELDS,
    of_agent,
    of_execution,
    write_csv,
    write_ndjson,
)
from agentperf_redis.metrics.model import Execution, PerformanceMetrics

ENDED = datetime(2026, 3, 1, 12, 0, 0, 123000)  # noqa: DTZ001  naive local time, as the library returns it


def test_agent_without_executions_has_no_shortest_duration() -> None:
    assert of_agent(PerformanceMetrics("planner"))["min_s"] is None
    assert of_agent(PerformanceMetrics("planner"))["last_execution"] is None


def test_csv_round_trip_keeps_every_field() -> None:
    record = of_agent(
        PerformanceMetrics(
            'a, "b"\nc', task_count=2, failure_count=1, error_types={"Timeout,Error": 1}, last_execution=ENDED
        )
    )
    file = io.StringIO()
    write_csv([record], AGENT_FIELDS, file)
    (row,) = csv.DictReader(io.StringIO(file.getvalue()))
    assert tuple(row) == AGENT_FIELDS
    assert row["agent"] == 'a, "b"\nc'
    assert json.loads(row["errors"]) == {"Timeout,Error": 1}
    assert datetime.fromisoformat(row["last_execution"]).astimezone() == ENDED.astimezone()
    assert (row["percentiles_exact"], row["failures"]) == ("true", "1")


def test_ndjson_is_one_object_a_line() -> None:
    found = (
        Execution(ENDED, 1.5, success=True, cancelled=False, error_type=None),
        Execution(ENDED, 0.5, success=False, cancelled=True, error_type=None),
        Execution(ENDED, 2.5, success=False, cancelled=False, error_type="TimeoutError"),
    )
    file = io.StringIO()
    write_ndjson((of_execution("planner", each) for each in found), file)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [tuple(row) for row in rows] == [EXECUTION_FIELDS] * 3
    assert [row["outcome"] for row in rows] == ["success", "cancelled", "failure"]
    assert [row["error"] for row in rows] == [None, None, "TimeoutError"]
    assert datetime.fromisoformat(rows[0]["ended"]).tzinfo is not None


def test_infinite_values_are_null_in_ndjson() -> None:
    file = io.StringIO()
    write_ndjson([{"a": float("inf"), "b": float("nan"), "c": 1.0}], file)
    assert json.loads(file.getvalue()) == {"a": None, "b": None, "c": 1.0}
