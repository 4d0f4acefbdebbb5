"""Tests of `agentperf export csv|ndjson|grafana`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf, keys
from tests.support.commandline import FAILURE, NOT_FOUND, OK, USAGE, Run, document, shown
from tests.support.servers import Raw


def fill(perf: AgentPerf) -> None:
    for number in range(5):
        perf.metrics.record_execution("planner", 0.5 + number, number != 0, 'Timeout, "x"' if number == 0 else None)
    perf.metrics.record_execution('say "hi", now', 2.0, success=True)
    perf.metrics.record_llm("planner", model="m", tokens_in=3, cost=0.25)
    assert perf.metrics.flush()


def test_csv_of_agents_equals_the_api(agentperf: Run, perf: AgentPerf) -> None:
    fill(perf)
    rows = list(csv.DictReader(io.StringIO(shown(agentperf("export", "csv", "agents")))))
    agents = perf.metrics.snapshots()
    assert [row["agent"] for row in rows] == list(agents)
    for row, agent in zip(rows, agents.values(), strict=True):
        assert int(row["tasks"]) == agent.task_count
        assert float(row["p95_s"]) == agent.p95_execution_time
        assert float(row["total_s"]) == agent.total_execution_time
        assert float(row["cost"]) == agent.cost
        assert json.loads(row["errors"] or "{}") == agent.error_types


def test_ndjson_of_agents_has_the_same_fields(agentperf: Run, perf: AgentPerf) -> None:
    fill(perf)
    header, *_ = shown(agentperf("export", "csv", "agents", "--window", "1h")).splitlines()
    rows = [json.loads(line) for line in shown(agentperf("export", "ndjson", "agents", "--window", "1h")).splitlines()]
    assert [",".join(row) for row in rows] == [header] * 2
    assert rows[0]["errors"] == {'Timeout, "x"': 1}
    assert rows[0]["end"] - rows[0]["start"] >= 3600


def test_executions_are_those_of_the_api(agentperf: Run, perf: AgentPerf) -> None:
    fill(perf)
    rows = [json.loads(line) for line in shown(agentperf("export", "ndjson", "executions")).splitlines()]
    expected = [
        (agent, each.seconds, each.error_type)
        for agent in perf.metrics.snapshots()
        for each in reversed(perf.metrics.recent(agent, limit=1000))
    ]
    assert [(row["agent"], row["seconds"], row["error"]) for row in rows] == expected
    only = shown(agentperf("export", "csv", "executions", "planner", "--window", "60")).splitlines()
    assert only[0] == "agent,ended,seconds,outcome,error"
    assert len(only) == 6
    assert sum(",failure," in line for line in only) == 1


def test_executions_before_the_window_are_omitted(agentperf: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    fill(perf)
    key = keys.metrics_latest(namespace, keys.metrics_shard("planner"), "planner")
    (sample,) = raw.lrange(key, 0, 0)
    raw.lpush(key, f"{int(sample[:13]) - 300_000}{sample[13:]}")
    assert len(shown(agentperf("export", "csv", "executions", "planner", "--window", "1h")).splitlines()) == 7
    assert len(shown(agentperf("export", "csv", "executions", "planner", "--window", "2m")).splitlines()) == 6


@pytest.mark.parametrize("lines", ["csv", "ndjson"])
def test_json_is_one_document_with_the_same_records(agentperf: Run, perf: AgentPerf, lines: str) -> None:
    fill(perf)
    rows = [json.loads(line) for line in shown(agentperf("export", "ndjson", "executions")).splitlines()]
    found = document(agentperf("export", lines, "executions", "--json"), f"export {lines}")
    assert (found["records"], found["window"], found["rows"]) == ("executions", None, rows)


def test_empty_namespace_writes_only_a_header(agentperf: Run) -> None:
    assert shown(agentperf("export", "csv", "executions")) == "agent,ended,seconds,outcome,error\n"
    assert shown(agentperf("export", "ndjson", "agents")) == ""


@pytest.mark.parametrize("records", ["agents", "executions"])
def test_unknown_agent_exits_4(agentperf: Run, perf: AgentPerf, records: str) -> None:
    fill(perf)
    done = agentperf("export", "csv", records, "planner", "unknown")
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert "'unknown'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("csv", "agents", "--window", "foo"), "--window is 'foo'"),
        (("csv", "agents", "--json", "--output", "x"), "--output does not go with --json"),
        (("csv", "pools"), "pools"),
        (("xml", "agents"), "xml"),
    ],
)
def test_wrong_usage_exits_2(agentperf: Run, words: tuple[str, ...], message: str) -> None:
    done = agentperf("export", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert message in done.stderr


def test_output_goes_to_a_file(agentperf: Run, perf: AgentPerf, tmp_path: Path) -> None:
    fill(perf)
    file = tmp_path / "executions.csv"
    assert shown(agentperf("export", "csv", "executions", "--output", str(file))) == ""
    assert file.read_text() == shown(agentperf("export", "csv", "executions"))
    done = agentperf("export", "csv", "agents", "--output", str(tmp_path / "none" / "agents.csv"))
    assert done.returncode == FAILURE
    assert "cannot write" in done.stderr


@pytest.mark.thorough
def test_dashboard_is_written(agentperf: Run, tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    file = tmp_path / "dashboard.json"
    assert agentperf("export", "grafana", "--output", str(file)).returncode == OK
    written = json.loads(file.read_text())
    assert json.loads(shown(agentperf("export", "grafana"))) == written
    assert document(agentperf("export", "grafana", "--json"), "export grafana")["dashboard"] == written
