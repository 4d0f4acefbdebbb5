"""The README's programs run as they are written."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool
from tests.commandline import said
from tests.servers import Raw, Server

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_there_is_a_program_for_each_service_both_ways() -> None:
    for service in ("perf.metrics", "perf.cache(", "perf.tiered_cache(", "perf.balancer()"):
        assert any(service in program for program in PROGRAMS)
    assert sum("asyncio.run" in program for program in PROGRAMS) >= 3


# What stands in the first column of the tables under "What else there is": one call or two, in one code span.
CALLS = re.findall(r"^\| `((?:m\.|with m\.|answers\.|perf\.|lb\.|lease\.).*?)` \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_runs(program: str, server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        env={**os.environ, "AGENTPERF_REDIS_URL": server.url, "PYTHONPATH": str(README.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, said(done.stderr)) == (0, [])
    assert done.stdout


def test_there_are_calls_of_each_service() -> None:
    for start, least in (("m.", 8), ("answers.", 4), ("perf.", 4), ("lb.", 7), ("lease.", 1)):
        assert sum(call.startswith(start) for call in CALLS) >= least


@pytest.fixture
def names(perf: AgentPerf) -> Iterator[dict[str, Any]]:
    """What the calls find: a pool with room, an agent with a record, an instance and a lease that are held."""
    lb = perf.balancer("consistent_hash")  # the one strategy that all the calls are allowed under
    instance = AgentInstance("coder-1", "coder", max_capacity=9, labels=frozenset({"gpu"}))
    lb.register_instance(instance)
    perf.metrics.record_execution("planner", 0.25, success=True)
    answers = perf.cache("answers")
    answers.put("b", 2, ttl=60)
    held = lb.acquire("coder")
    assert held is not None
    with lb.lease("coder") as lease:
        yield {"perf": perf, "m": perf.metrics, "answers": answers, "lb": lb, "instance": held, "lease": lease}
    lb.release(held)


@pytest.mark.parametrize("call", [call for call in CALLS if "wait_until_idle" not in call])
def test_a_call_in_the_tables_runs(call: str, names: dict[str, Any]) -> None:
    exec(call, names)
    for unreleased in [each for each in names["lb"].leases("coder").leases if each.token != names["lease"].token]:
        names["lb"].release_token("coder", unreleased.token)


def test_an_instance_is_drained_as_the_tables_say(perf: AgentPerf) -> None:
    (call,) = (call for call in CALLS if "wait_until_idle" in call)
    lb = perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder"))
    exec(call, {"lb": lb})
    assert lb.acquire("coder") is None


def test_the_keys_are_those_that_are_listed(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    lb = perf.balancer()
    for number in (1, 2, 3):
        labels = frozenset({"gpu"} if number == 2 else ())
        lb.register_instance(AgentInstance(f"coder-{number}", "coder", max_capacity=5, labels=labels))
    pool = Pool.of(namespace, "coder")
    perf.backend.run(commands.claim_checks(pool, 60_000, 8))
    for at_ms in (1, 2, 3):  # three in a row take it out
        perf.backend.run(commands.report_checks(pool, at_ms, [("coder-3", False)]))
    held = lb.acquire("coder")
    ended = lb.acquire("coder")
    assert ended is not None
    assert ended.lease is not None
    assert lb.release_token("coder", ended.lease.token)
    perf.cache("answers", default_ttl=300).put("greeting", "hello")
    perf.tiered_cache("docs").put("page", {"title": "Agents"}, "hot")
    for took in (0.02, 0.0201, 0.0202):
        perf.metrics.record_execution("planner", took, success=True)
    perf.metrics.record_execution("planner", 0.0214, success=False, error_type="TimeoutError")
    perf.metrics.flush()

    def plain(key: str) -> str:
        """Without what differs each time."""
        key = re.sub(r"(10s|1m|1h|1d):20[-:T0-9]*:", r"\1:<UTC>:", key.replace(f"{namespace}:", "agentperf:"))
        return re.sub(r":w:.*", ":w:<writer>", key)

    found = {(plain(key), raw.type(key).upper()) for key in raw.scan_iter(f"{namespace}:*")}
    listed = re.findall(r"^(agentperf:\S+) +(HASH|ZSET|STRING|LIST|STREAM)\b", TEXT, re.MULTILINE)
    assert {(plain(key), kind) for key, kind in listed} == found
    state = raw.hgetall(f"{namespace}:{{lb:coder}}:state")
    shown = re.search(r"hgetall 'agentperf:{lb:coder}:state'\n((?:[#@+c].*\n)+)", TEXT)
    assert shown is not None
    lines = dict(line.split(maxsplit=1) for line in shown[1].splitlines())
    assert {name for name in lines if name[0] != "@"} == {name for name in state if name[0] != "@"}
    assert len(lines) == len(state)
    numbers = re.compile(r"\b\d{12,}\b")  # stamps
    assert numbers.sub("*", state["coder-1"]) in numbers.sub("*", lines["coder-1"])
    assert numbers.sub("*", state["coder-2"]) == numbers.sub("*", lines["coder-2"])
    assert numbers.sub("*", state["coder-3"]) in numbers.sub("*", lines["coder-3"])
    assert lines["+coder-3"].startswith(state["+coder-3"] + " ")
    assert lines["#settings"] == state["#settings"]
    others = [lines[name] for name in sorted(lines) if name[0] == "@"][1:]
    assert [line.split()[:2] for line in others] == [["tombstone", "why=released"]]
    assert lb.release(held)


def test_the_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    defined = {
        name
        for path in README.parent.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 10
    assert named - defined == set()


def record(url: str, namespace: str) -> bool:
    """A task of a pool; the AgentPerf is the process's, and is not closed."""
    perf = AgentPerf(url, namespace=namespace)
    perf.metrics.record_execution("planner", 0.1, success=True)
    return perf.metrics.flush()


def test_a_task_of_a_pool_that_flushes_is_counted(server: Server, namespace: str, perf: AgentPerf) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(record, [(server.url, namespace)] * 4) == [True] * 4
    assert perf.metrics.snapshots()["planner"].task_count == 4
