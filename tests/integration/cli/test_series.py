"""Tests of `agentperf series`: its table at any width, its JSON, and exit codes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, keys
from agentperf_redis.balancer import history as pool_history
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cli import console
from agentperf_redis.metrics.accumulator import OK as SUCCEEDED
from tests.support.commandline import NOT_FOUND, OK, UNREACHABLE, USAGE, Program, Run, document, shown
from tests.support.filled import Past
from tests.support.servers import Raw, Server

AGENT_ROW: dict[str, type | tuple[type, ...]] = {
    "start": float,
    "end": float,
    "tasks": int,
    "errors": int,
    "cancelled": int,
    "failure_rate": float,
    "throughput_per_s": float,
    "avg_s": float,
    "p50_s": float,
    "p95_s": float,
    "p99_s": float,
    "max_s": float,
    "tokens_in": int,
    "tokens_out": int,
    "cost": float,
}


@pytest.fixture
def past(raw: Raw, namespace: str) -> Past:
    """The planner ran once four minutes ago, and eight times two minutes ago. One of the eight executions failed."""
    recorded = Past(raw, namespace)
    recorded.at(240.0).record("planner", 0.25, SUCCEEDED)
    for number in range(8):
        recorded.at(120.0).record("planner", 123456.789, "err:TimeoutError" if number == 0 else SUCCEEDED)
    recorded.buffer.add("planner", {"tok_in": 1_234_567_890, "tok_out": 1, "cost_nano": 1_234_567_890})
    recorded.count()
    return recorded


def fits(document: dict[str, Any], row: dict[str, type | tuple[type, ...]], **head: object) -> list[dict[str, Any]]:
    """Check a document against its schema, and return its rows."""
    rows: list[dict[str, Any]] = document.pop("rows")
    assert document == {"kind": "series", "version": 1, **head}
    for each in rows:
        assert list(each) == list(row)
        for name, kind in row.items():
            assert isinstance(each[name], kind), (name, each[name])
    return rows


def test_series_command_prints_a_row_for_each_step(agentperf: Run, past: Past) -> None:
    lines = shown(agentperf("series", "planner", "--window", "10m")).splitlines()
    assert lines[0].split() == ["planner,", "10m", "by", "1m"]
    assert lines[1].split() == [
        *("start", "tasks", "errors", "p50", "s", "p95", "s", "p99", "s", "max", "s", "tokens", "cost", "tasks"),
    ]
    minute = {time.strftime("%H:%M", time.localtime(past.now - age)): age for age in (240, 120)}
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert len(rows) in (10, 11)
    (four,), (two,) = ([rows[at] for at, age in minute.items() if age == each] for each in (240, 120))
    assert four == ["1", "0", "≈0.250", "≈0.250", "≈0.250", "0.250", "0", "0", "█▎"]
    assert two[:2] == ["8", "1"]
    assert two[-4:] == ["123456.789", "1234567891", "1.23457", "██████████"]
    assert sum(row[0] == "0" for row in rows.values()) == len(rows) - 2
    assert all(row == ["0", "0", "–", "–", "–", "–", "0", "0"] for row in rows.values() if row[0] == "0")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_number_is_cut(agentperf: Run, past: Past, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(console.out, "width", width)
    for words in (("--window", "10m"), ("--window", "5m", "--step", "10s"), ("--window", "3d", "--step", "6h")):
        text = shown(agentperf("series", "planner", *words))
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        rows = [line.split() for line in text.splitlines()[2:]]
        at = 2 if "3d" in words else 1
        assert sum(int(row[at]) for row in rows) == 9, "one line a row"
        assert sum(int(row[at + 1]) for row in rows) == 1
        heads = text.splitlines()[1]
        assert "p95 s" in heads
        assert "cost" in heads or width < 140
        assert "█" in text or width == 40


def test_series_json_has_its_schema(agentperf: Run, past: Past) -> None:
    found = document(agentperf("series", "planner", "--window", "600", "--step", "60", "--json"), "series")
    bound = found["error_bound"]
    rows = fits(found, AGENT_ROW, agent="planner", window="600", step="60", as_of=None, error_bound=bound)
    assert round(bound, 4) == 0.0217
    assert sum(row["tasks"] for row in rows) == 9
    assert sum(row["tokens_in"] for row in rows) == 1_234_567_890
    assert rows[0]["start"] % 60 == 0
    (failed,) = [row for row in rows if row["errors"]]
    assert (failed["failure_rate"], failed["max_s"]) == (0.125, 123456.789)


def test_as_of_takes_local_utc_and_unix_times(agentperf: Run, past: Past) -> None:
    end = (past.now - 180) // 60 * 60
    spellings = (
        time.strftime("%Y-%m-%dT%H:%M", time.localtime(end)),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end)),
        time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(end)),
        f"{end:.0f}",
    )
    for spelling in spellings:
        words = ("series", "planner", "--window", "5m", "--as-of", spelling, "--json")
        found = document(agentperf(*words), "series")
        assert found["rows"][-1]["end"] == end
        assert sum(row["tasks"] for row in found["rows"]) == 1


def test_idle_agent_has_rows_of_zeros(agentperf: Run, perf: AgentPerf, past: Past) -> None:
    text = shown(agentperf("series", "planner", "--window", "5m", "--as-of", f"{past.now - 2000:.0f}"))
    assert len(text.splitlines()) in (7, 8)


@pytest.mark.parametrize("words", [("nobody",), ("--cache", "nobody"), ("--pool", "nobody")])
def test_unknown_name_exits_4(agentperf: Run, past: Past, words: tuple[str, ...]) -> None:
    done = agentperf("series", *words)
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert "'nobody'" in done.stderr


CACHE_ROW: dict[str, type | tuple[type, ...]] = {
    "start": float,
    "end": float,
    "hits": (int, type(None)),
    "misses": (int, type(None)),
    "hit_rate": (float, type(None)),
    "entries": (int, type(None)),
    "bytes": (int, type(None)),
    "evictions": (int, type(None)),
}
POOL_ROW: dict[str, type | tuple[type, ...]] = {
    "start": float,
    "end": float,
    "load": (float, type(None)),
    "waiters": (int, type(None)),
    "unhealthy": (int, type(None)),
}


@pytest.fixture
def sampled(perf: AgentPerf, raw: Raw, namespace: str) -> AgentPerf:
    """A cache with two samples in the history, and a pool with one."""
    perf.cache("docs").put("page", "text")
    perf.balancer().register_instance(AgentInstance("coder-1", "coder"))
    where = keys.cache(namespace, "cache", "docs")
    perf.backend.run(cache_history.sample(where))
    raw.hset(where.meta, mapping={"cold": 30, "misses": 10, "evicted": 2, "bytes": 5 * 2**20})
    raw.hdel(where.history, "claimed")  # as if ten seconds had passed
    perf.backend.run(cache_history.sample(where))
    with perf.balancer().lease("coder"):
        perf.backend.run(pool_history.sample(Pool.of(namespace, "coder")))
    return perf


@pytest.mark.parametrize("width", [40, 60, 140])
def test_caches_and_pools_have_series(
    agentperf: Run, sampled: AgentPerf, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console.out, "width", width)
    lines = shown(agentperf("series", "--cache", "docs", "--window", "5m")).splitlines()
    assert lines[1].split()[:5] == ["start", "hits", "misses", "hit", "rate"]
    assert lines[2].split()[1:4] == ["–", "–", "–"]
    last = [line.split() for line in lines if "%" in line][-1]
    assert last[1:4] == ["30", "10", "75.0%"]
    assert last[4:] == ["1", "5.00", "2", "██████████"] or width < 140
    lines = shown(agentperf("series", "--pool", "coder", "--window", "5m")).splitlines()
    assert lines[1].split()[:4] == ["start", "load", "waiters", "unhealthy"]
    assert [line.split()[1:4] for line in lines[2:] if "–" not in line] == [["1.0", "0", "0"]]


def test_json_of_caches_and_pools_has_its_schema(agentperf: Run, sampled: AgentPerf) -> None:
    head = {"window": "5m", "step": "1m", "as_of": None}
    found = document(agentperf("series", "--cache", "docs", "--window", "5m", "--json"), "series")
    rows = fits(found, CACHE_ROW, cache="docs", **head)
    last = [row for row in rows if row["hits"]][-1]
    assert {name: last[name] for name in ("hits", "misses", "hit_rate", "entries", "evictions")} == {
        "hits": 30,
        "misses": 10,
        "hit_rate": 0.75,
        "entries": 1,
        "evictions": 2,
    }
    assert rows[0]["hits"] is None
    found = document(agentperf("series", "--pool", "coder", "--window", "5m", "--json"), "series")
    rows = fits(found, POOL_ROW, pool="coder", **head)
    assert [(row["load"], row["waiters"], row["unhealthy"]) for row in rows if row["load"]] == [(1.0, 0, 0)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "AGENT"),
        (("planner", "--cache", "docs"), "only one"),
        (("--pool", "coder", "--cache", "docs"), "only one"),
        (("--cache", "docs", "--step", "15"), "--step"),
        (("--pool", "coder", "--window", "1d"), "a multiple of 1h"),
        (("planner", "--step", "15"), "--step"),
        (("planner", "--step", "2h"), "--step"),
        (("planner", "--window", "1d"), "a multiple of 1h"),
        (("planner", "--window", "soon"), "--window"),
        (("planner", "--as-of", "yesterday"), "--as-of"),
        (("planner", "--as-of", "-5"), "--as-of"),
    ],
)
def test_wrong_usage_names_the_option(agentperf: Run, past: Past, words: tuple[str, ...], named: str) -> None:
    done = agentperf("series", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert named in done.stderr
    assert done.stderr.startswith("agentperf: ")


def test_unreachable_server_exits_3(agentperf: Run) -> None:
    done = agentperf("series", "planner", "--url", "redis://127.0.0.1:1/0", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")


@pytest.mark.thorough
def test_program_without_a_terminal_prints_whole_lines(
    program: Program, server: Server, namespace: str, past: Past
) -> None:
    done = program(
        *("series", "planner", "--window", "5m", "--url", server.url, "--namespace", namespace),
        COLUMNS="",
        LANG="C.UTF-8",
    )
    assert done.returncode == OK
    assert any(line.split()[1:3] == ["8", "1"] for line in done.stdout.splitlines())
