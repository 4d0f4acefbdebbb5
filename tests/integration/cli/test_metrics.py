"""Tests of the metrics commands: output on stdout and stderr, and exit codes."""

from __future__ import annotations

import json
import math
import time
from datetime import datetime

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.metrics import spans
from tests.support.commandline import NOT_FOUND, OK, UNREACHABLE, USAGE, Run, document, has_line, shown
from tests.support.servers import Raw

COMMANDS = {
    "agents": (),
    "show": ("planner",),
    "errors": (),
    "slow": (),
    "rank": (),
    "compare": ("planner", "critic"),
    "spans": ("planner",),
}


@pytest.fixture
def used(perf: AgentPerf) -> AgentPerf:
    """Record executions and LLM usage of a planner and a critic. Only the planner fails; only the critic streams."""
    metrics = perf.metrics
    for number in range(8):
        metrics.record_execution("planner", 0.25 * (number + 1), number >= 3, None if number >= 3 else "TimeoutError")
    metrics.record_execution("planner", 4.0, False)
    metrics.record_cancellation("planner", 0.5)
    for _ in range(3):
        metrics.record_execution("critic", 0.125, True)
    metrics.record_llm(
        "planner", tokens_in=100, tokens_cached_in=64, tokens_out=20, tokens_reasoning=12, cost=0.5, model="m-1"
    )
    metrics.record_llm("critic", tokens_in=1, cost=0.25)
    metrics.record_stream("critic", 12, 0.5, 0.01)
    metrics.flush()
    return perf


def test_agents_command_lists_every_agent(agentperf: Run, used: AgentPerf) -> None:
    text = shown(agentperf("agents"))
    assert has_line(text, "planner", "10", "50.0%", "TimeoutError × 3")
    assert has_line(text, "critic", "3", "100.0%", "0.125")
    found = document(agentperf("agents", "--json", "--window", "5m"), "agents")
    assert found["window"] == "5m"
    assert {each["agent"]: each["tasks"] for each in found["agents"]} == {"planner": 10, "critic": 3}


def test_agents_show_when_they_were_last_seen(agentperf: Run, used: AgentPerf) -> None:
    found = document(agentperf("agents", "--json"), "agents")
    for each in found["agents"]:
        assert abs(time.time() - datetime.fromisoformat(each["last_seen"]).timestamp()) < 120
    assert has_line(shown(agentperf("agents")), "last seen")
    assert has_line(shown(agentperf("agents", "--window", "1h")), "per s")


@pytest.mark.thorough
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "slow"])
def test_past_windows_end_at_the_given_time(agentperf: Run, used: AgentPerf, command: str) -> None:
    words = (command, *COMMANDS[command], "--window", "1h", "--as-of")
    assert "10" in shown(agentperf(*words, f"{time.time() + 60:.0f}"))
    past = agentperf(*words, "2h ago", "--json")
    assert (past.returncode, past.stderr) == (OK, "")
    assert '"tasks": 3' not in past.stdout
    assert document(past, command)["as_of"] == "2h ago"
    wrong = agentperf(*words, "noon")
    assert (wrong.returncode, wrong.stdout) == (USAGE, "")
    assert "--as-of is 'noon'; allowed: a time such as" in wrong.stderr
    without = agentperf(command, *COMMANDS[command], "--as-of", "2h ago")
    assert (without.returncode, without.stdout) == (USAGE, "")
    assert "give --window with --as-of" in without.stderr


def test_compare_takes_a_window_of_the_other_side(agentperf: Run, used: AgentPerf) -> None:
    words = ("compare", "planner", "--window", "1h", "--other-window", "1h", "--other-as-of", "3h ago", "--json")
    found = document(agentperf(*words), "compare")
    gap = found["second"]["interval"]["end"] - found["first"]["interval"]["end"]
    assert 2 * 3600 <= gap <= 5 * 3600  # for data three hours old, only one-hour slices are kept


def test_show_prints_everything_about_an_agent(agentperf: Run, used: AgentPerf) -> None:
    text = shown(agentperf("show", "planner"))
    assert "planner, all time: 10 executions" in text
    assert "5 succeeded (50.0%), 4 failed, 1 cancelled" in text
    assert "p95 4.000 s" in text
    assert "exact" in text
    assert "100 tokens in, 20 out, cost 0.5" in text
    assert "64 tokens in read from the provider's cache, 0 written to it; 12 out of reasoning" in text
    assert has_line(text, "TimeoutError", "3", "30.0%")
    assert has_line(text, "(no type)", "1", "10.0%")
    assert has_line(text, "m-1", "100", "20", "64", "12")
    assert "cache write" not in text, "a column of zeros is left out"
    assert has_line(text, "cancelled", "0.500")
    assert "12 items" in shown(agentperf("show", "critic"))

    found = document(agentperf("show", "planner", "--json"), "show")
    assert (found["tasks"], found["successes"], found["failures"], found["cancelled"]) == (10, 5, 4, 1)
    assert (found["percentiles_exact"], found["error_bound"], found["min_s"], found["max_s"]) == (True, 0.0, 0.25, 4.0)
    parts = {"tokens_cached_in": 64, "tokens_cache_write": 0, "tokens_reasoning": 12}
    assert found["models"] == {"m-1": {"calls": 1, "tokens_in": 100, "tokens_out": 20, "cost": 0.5, **parts}}
    assert {name: found[name] for name in parts} == parts
    assert len(found["latest"]) == 5


def test_estimated_percentiles_are_marked(agentperf: Run, perf: AgentPerf) -> None:
    for number in range(1100):
        perf.metrics.record_execution("planner", 1.0 + number / 1000, True)
    perf.metrics.flush()
    for words in (("agents",), ("show", "planner"), ("rank", "--by", "p95"), ("spans", "planner")):
        assert "≈" in shown(agentperf(*words)), words
    assert "within 2.17%" in shown(agentperf("show", "planner"))
    found = document(agentperf("show", "planner", "--json"), "show")
    assert (found["percentiles_exact"], round(found["error_bound"], 4)) == (False, 0.0217)
    assert math.isclose(found["p95_s"], 2.045, rel_tol=0.0217)


def test_forget_deletes_agents_by_name_and_glob(agentperf: Run, used: AgentPerf) -> None:
    for name in ("job-1", "job-2", "job-3", "[x]", "__other__"):
        used.metrics.record_execution(name, 0.125, True)
    used.metrics.flush()
    unconfirmed = agentperf("forget", "job-*")
    assert (unconfirmed.returncode, "--yes" in unconfirmed.stderr) == (USAGE, True)
    assert "Delete the metrics of 3 agents (job-1, job-2, job-3)?" in unconfirmed.stderr
    done = agentperf("forget", "job-[12]", "[x]", "nothing", "--yes")
    assert (done.returncode, done.stdout) == (NOT_FOUND, "Forgot 3 agents.\n")
    assert done.stderr.startswith("agentperf: not found: agent 'nothing': no records;")
    done = agentperf("forget", "*", "no-*", "neither", "--yes", "--json")
    assert done.stderr.startswith("agentperf: not found: agents 'no-*', 'neither': no records;")
    assert done.returncode == NOT_FOUND
    found = json.loads(done.stdout)
    assert (found["asked"], found["agents"], found["missing"]) == (
        ["*", "no-*", "neither"],
        ["critic", "job-3", "planner"],
        ["no-*", "neither"],
    )
    assert list(used.metrics.snapshots()) == ["__other__"], "a glob leaves it"
    assert agentperf("forget", "*", "--yes").returncode == NOT_FOUND
    assert agentperf("forget", "__other__", "--yes").returncode == OK
    assert not used.metrics.snapshots()


def test_short_durations_are_shown_in_ms_and_us(agentperf: Run, perf: AgentPerf) -> None:
    for seconds in (0.000_04, 0.000_04, 0.003_25):
        perf.metrics.record_execution("quick", seconds, True)
    perf.metrics.flush()
    text = shown(agentperf("show", "quick"))
    assert "from 40 µs to 3.25 ms, 3.33 ms in all" in text
    assert "p50 40 µs, p95 3.25 ms" in text
    assert has_line(text.replace(":", " "), "quick", "ok", "0.000040")
    assert has_line(shown(agentperf("agents")), "quick", "0.001110", "0.000040")


def test_errors_are_listed_by_frequency(agentperf: Run, used: AgentPerf) -> None:
    used.metrics.record_execution("critic", 0.125, False, "KeyError")
    used.metrics.flush()
    lines = shown(agentperf("errors")).splitlines()
    order = [line.split()[:2] for line in lines[2:]]
    assert order == [["planner", "TimeoutError"], ["critic", "KeyError"], ["planner", "(no"]]
    assert has_line("\n".join(lines), "critic", "KeyError", "1", "25.0%")
    found = document(agentperf("errors", "planner", "--json"), "errors")
    assert found["errors"] == [
        {"agent": "planner", "error": "TimeoutError", "count": 3, "share": 0.3},
        {"agent": "planner", "error": "", "count": 1, "share": 0.1},
    ]


def test_errors_reports_an_agent_without_failures(agentperf: Run, used: AgentPerf) -> None:
    done = agentperf("errors", "critic")
    assert (done.returncode, done.stdout, done.stderr) == (OK, "", "Nothing failed.\n")


def test_slow_lists_the_slowest_executions(agentperf: Run, used: AgentPerf) -> None:
    lines = shown(agentperf("slow", "--limit", "3")).splitlines()
    assert [line.split()[2:] for line in lines[2:]] == [
        ["planner", "failed", "4.000"],
        ["planner", "ok", "2.000"],
        ["planner", "ok", "1.750"],
    ]
    (slowest, *_) = document(agentperf("slow", "critic", "--json"), "slow")["executions"]
    assert (slowest["agent"], slowest["seconds"], slowest["success"]) == ("critic", 0.125, True)


def test_rank_orders_agents_by_the_given_figure(agentperf: Run, used: AgentPerf) -> None:
    lines = shown(agentperf("rank")).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["critic", "planner"]
    lines = shown(agentperf("rank", "--by", "p95", "--window", "300")).splitlines()
    assert lines[0] == "agents by p95, the last 300 s"
    assert [line.split()[1:3] for line in lines[2:]] == [["planner", "4"], ["critic", "0.125"]]
    assert "40.0%" in shown(agentperf("rank", "--by", "error_rate"))
    found = document(agentperf("rank", "--by", "tasks", "--min-tasks", "5", "--json"), "rank")
    assert [(each["agent"], each["value"]) for each in found["agents"]] == [("planner", 10.0)]


def test_compare_shows_two_agents(agentperf: Run, used: AgentPerf) -> None:
    text = shown(agentperf("compare", "planner", "critic"))
    assert has_line(text, "figure", "critic", "planner", "change")
    assert has_line(text, "task_count", "3", "10", "+233.3%")
    found = document(agentperf("compare", "planner", "critic", "--json"), "compare")
    assert (found["first"]["agent"], found["second"]["agent"]) == ("critic", "planner")
    assert found["changes"]["task_count"] == {"first": 3.0, "second": 10.0, "ratio": 10 / 3, "certain": True}


def test_compare_shows_an_agent_before_the_window(agentperf: Run, used: AgentPerf) -> None:
    done = agentperf("compare", "planner", "--window", "1h")
    assert (done.returncode, done.stderr) == (OK, "planner had no executions in the time before the last 1h.\n")
    assert done.stdout.startswith("before → planner, the last 1h")
    assert has_line(done.stdout, "task_count", "–", "10", "–")
    assert has_line(done.stdout, "min_execution_time", "–", "0.25", "–")
    assert {line.split()[1] for line in done.stdout.splitlines()[2:]} == {"–"}
    found = document(agentperf("compare", "planner", "--window", "1h", "--json"), "compare")
    assert found["changes"]["task_count"]["first"] == 0.0
    assert found["changes"]["min_execution_time"]["first"] is None


def test_spans_show_the_bottleneck(agentperf: Run, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, now = perf.metrics, [100.0]
    monkeypatch.setattr(spans, "perf_counter", lambda: now[0])
    with metrics.track("planner"), metrics.span("planner", "think"):
        now[0] += 0.01
        with metrics.span("planner", "tool:search"):
            now[0] += 0.05
        with pytest.raises(KeyError), metrics.span("planner", "tool:read"):
            raise KeyError
    metrics.flush()
    text = shown(agentperf("spans", "planner"))
    names = [line.split("   0.")[0].rstrip() for line in text.splitlines()[2:6]]
    assert names == ["planner", "  think", "    tool:read", "    tool:search"]
    assert "is spent in think/tool:search." in text
    found = document(agentperf("spans", "planner", "--json", "--window", "5m"), "spans")
    assert found["bottleneck"] == ["think", "tool:search"]
    assert sum(each["self_s"] for each in found["spans"]) == pytest.approx(found["total_s"])
    assert {tuple(each["path"]): each["failures"] for each in found["spans"]}["think", "tool:read"] == 1


@pytest.mark.parametrize("words", [("show",), ("errors",), ("slow",), ("spans",), ("compare", "critic")])
def test_unknown_agents_exit_4(agentperf: Run, used: AgentPerf, words: tuple[str, ...]) -> None:
    for more in ((), ("--json",)):
        done = agentperf(*words, "unknown", *more)
        assert (done.returncode, done.stdout) == (NOT_FOUND, "")
        assert "'unknown'" in done.stderr


def test_idle_agents_are_still_known(agentperf: Run, used: AgentPerf, raw: Raw, namespace: str) -> None:
    """An agent without records in the window is known, unlike an agent without any records."""
    for width in ("10s", "1m", "1h", "1d"):
        raw.delete(*raw.keys(f"{namespace}:*:{width}:*"))  # as if the time slices had expired
    assert "planner, the last 5m: 0 executions" in shown(agentperf("show", "planner", "--window", "5m"))
    assert document(agentperf("show", "planner", "--window", "5m", "--json"), "show")["min_s"] is None
    for command in ("spans", "compare"):
        done = agentperf(command, "planner", "--window", "5m")
        assert (done.returncode, done.stdout) == (OK, "")
        assert done.stderr.startswith("Nothing was recorded for")


@pytest.mark.parametrize("command", [name for name, words in COMMANDS.items() if not words])
def test_empty_namespace_shows_no_agents(agentperf: Run, command: str) -> None:
    done = agentperf(command)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[0]) == (OK, "", "Nothing was recorded.")
    assert document(agentperf(command, "--json"), command)


@pytest.mark.parametrize("command", COMMANDS)
def test_names_with_brackets_are_printed_unchanged(agentperf: Run, perf: AgentPerf, command: str) -> None:
    odd = "[/x] [red]:boom:"
    with pytest.raises(KeyError), perf.metrics.track(odd), perf.metrics.span(odd, odd):
        raise KeyError
    perf.metrics.record_llm(odd, model=odd, tokens_in=1)
    perf.metrics.flush()
    text = shown(agentperf(command, *(odd for _ in COMMANDS[command])))
    assert odd in text


@pytest.mark.parametrize("command", COMMANDS)
def test_unreachable_server_and_wrong_usage_have_exit_codes(agentperf: Run, command: str) -> None:
    words = COMMANDS[command]
    done = agentperf(command, *words, "--url", "redis://127.0.0.1:1/0", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")
    wrong = ("--limit", "0") if command == "slow" else ("--window", "5 parsecs")
    done = agentperf(command, *words, *wrong)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "5 parsecs" in done.stderr or command == "slow"
