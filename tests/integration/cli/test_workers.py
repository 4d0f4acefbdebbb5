"""`agentperf workers` and `agentperf running`: tables, JSON, exit codes, narrow terminals, empty data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.cli import console
from agentperf_redis.presence import ALIVE_S
from tests.support.commandline import NOT_FOUND, OK, UNREACHABLE, Run, document, has_line, shown
from tests.support.servers import Raw

PID = 4711
HOST = "worker-7.eu-west-1.compute.internal"


def is_time(value: object) -> bool:
    return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None


def is_a(*kinds: type) -> Callable[[object], bool]:
    return lambda value: type(value) in kinds


EXECUTION = {
    "agent": is_a(str),
    "host": is_a(str),
    "pid": is_a(int),
    "started": is_time,
    "age_s": is_a(float),
    "alive": is_a(bool),
}
WORKER = {
    "host": is_a(str),
    "pid": is_a(int),
    "state": lambda value: value in ("ok", "lost", "flush fails"),
    "since": is_time,
    "last_seen": is_time,
    "heartbeat_age_s": is_a(float),
    "alive": is_a(bool),
    "leases_held": is_a(int),
    "pending": is_a(int),
    "dropped": is_a(int),
    "error": is_a(str, type(None)),
    "running": lambda value: all(fits(each, EXECUTION) for each in value),
    "running_more": is_a(int),
    "python": is_a(str),
    "library": is_a(str),
}


def fits(found: dict[str, Any], schema: dict[str, Callable[[Any], bool]]) -> bool:
    """Check that a JSON object has exactly the fields of a schema, with values that the schema allows."""
    assert found.keys() == schema.keys()
    assert [name for name, allows in schema.items() if not allows(found[name])] == []
    return True


@pytest.fixture
def fleet(perf: AgentPerf, raw: Raw, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, in which two executions run, and another process, which could not flush and was killed 13 s ago."""
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)
    with perf.metrics.track("critic"), perf.metrics.track("planner"):
        perf.metrics.workers()
        lost, own = f"{HOST}:{PID}:0", keys.worker_name(perf.backend.process)
        record = keys.worker(namespace, lost)
        raw.copy(keys.worker(namespace, own), record)
        now_ms = int(raw.time()[0]) * 1000
        changed = {"pending": 123456, "dropped": 7, "error": "no reply", "more": 3, "leases": 12}
        running = f"planner {now_ms - 98_765_432} [red] {now_ms - 5000}"
        raw.hset(record, mapping={"host": HOST, "pid": PID, "running": running, **changed})
        raw.hincrby(record, "since_ms", -7_300_000)
        raw.zadd(keys.workers_seen(namespace), {lost: now_ms - (ALIVE_S + 1) * 1000})
        yield


def test_workers_command_lists_lost_workers_first(agentperf: Run, fleet: None) -> None:
    text = shown(agentperf("workers"))
    lost, own = [line for line in text.splitlines() if re.search(r":\d+ +(lost|ok) ", line)]
    assert re.fullmatch(rf"{HOST}:{PID} +lost +2h +\d+ +12 +5 +123456 +7 *", lost)
    assert re.search(rf":{os.getpid()} +ok +\d+s +\d+ +0 +2 +0 +0 *$", own)
    assert has_line(text, f"{HOST}:{PID}: the last flush failed: no reply")


def test_workers_json_fits_its_schema(agentperf: Run, fleet: None) -> None:
    found = document(agentperf("workers", "--json"), "workers")
    assert found.keys() == {"kind", "version", "workers"}
    assert all(fits(each, WORKER) for each in found["workers"])
    lost, own = found["workers"]
    assert (lost["pid"], lost["state"], lost["alive"], lost["error"]) == (PID, "lost", False, "no reply")
    assert (lost["leases_held"], lost["pending"], lost["dropped"], lost["running_more"]) == (12, 123456, 7, 3)
    assert (own["pid"], own["state"], own["error"]) == (os.getpid(), "ok", None)
    assert [each["agent"] for each in own["running"]] == ["critic", "planner"]


def test_running_command_lists_the_oldest_first(agentperf: Run, fleet: None) -> None:
    done = agentperf("running")
    assert done.returncode == OK
    agents = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert agents == ["planner", "[red]", "critic", "planner"]
    assert has_line(done.stdout, "planner", f"{HOST}:{PID}", "lost", "9876")
    assert "3 further ones" in done.stderr
    assert [line.split()[0] for line in agentperf("running", "critic").stdout.splitlines()[2:]] == ["critic"]


def test_running_json_fits_its_schema(agentperf: Run, fleet: None) -> None:
    found = document(agentperf("running", "planner", "--json"), "running")
    assert found.keys() == {"kind", "version", "agent", "executions", "more"}
    assert all(fits(each, EXECUTION) for each in found["executions"])
    assert (found["agent"], found["more"]) == ("planner", 3)
    assert [(each["pid"], each["alive"]) for each in found["executions"]] == [(PID, False), (os.getpid(), True)]
    assert found["executions"][0]["age_s"] == pytest.approx(98_765, abs=60)


@pytest.mark.parametrize("width", [60, 80])
def test_numbers_are_whole_on_a_narrow_terminal(
    agentperf: Run, fleet: None, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console.out, "width", width)
    monkeypatch.setattr(console.out, "soft_wrap", False)
    found = agentperf("workers").stdout
    table = found[: found.index(f"{HOST}:{PID}: the last")] if f"{HOST}:{PID}: the last" in found else found
    assert "123456" in table
    assert max(map(len, table.splitlines())) <= width
    found = agentperf("running").stdout
    assert re.search(r" 9876\d\.\d$", found, re.MULTILINE)
    assert max(map(len, found.splitlines())) <= width


def test_no_worker_is_said_so(agentperf: Run, perf: AgentPerf) -> None:
    done = agentperf("workers")
    assert (done.returncode, done.stdout, done.stderr.splitlines()[0]) == (
        OK,
        "",
        "No process records or holds leases now.",
    )
    assert document(agentperf("workers", "--json"), "workers")["workers"] == []
    done = agentperf("running")
    assert (done.returncode, done.stdout, done.stderr) == (OK, "", "Nothing has been running for a second.\n")
    found = document(agentperf("running", "--json"), "running")
    assert (found["executions"], found["more"], found["agent"]) == ([], 0, None)
    assert agentperf("running", "planner").returncode == NOT_FOUND
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.flush()
    done = agentperf("running", "planner")
    assert (done.returncode, done.stdout, done.stderr) == (OK, "", "Nothing of planner is running.\n")


@pytest.mark.parametrize("command", ["workers", "running"])
def test_unreachable_server_and_damaged_list_are_errors(agentperf: Run, raw: Raw, namespace: str, command: str) -> None:
    done = agentperf(command, "--url", "redis://127.0.0.1:1", "--timeout", "0.1")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")
    raw.set(keys.workers_seen(namespace), "x")
    done = agentperf(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert keys.workers_seen(namespace) in done.stderr
