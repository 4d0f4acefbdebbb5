"""Tests of the README: its programs and calls run as written, and every name in it exists."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import agentperf_redis
from agentperf_redis import AgentInstance, AgentPerf, command
from agentperf_redis import keys as key_names
from agentperf_redis.balancer import commands
from agentperf_redis.balancer import history as pool_history
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cli.app import app
from tests.support.commandline import said
from tests.support.places import README
from tests.support.recipes import PROGRAMS, recipe
from tests.support.servers import Raw, Server

TEXT = README.read_text(encoding="utf-8")


def test_programs_show_each_service_blocking_and_async() -> None:
    asynchronous = [program for program in PROGRAMS if "asyncio.run" in program]
    blocking = [program for program in PROGRAMS if "asyncio.run" not in program]
    for programs in (asynchronous, blocking):
        for service in (r"perf\.metrics", r"perf\.(tiered_)?cache\(", r"perf\.balancer\("):
            assert any(re.search(service, program) for program in programs), service


# The calls in the first column of the README's tables. A code span has one to three calls.
CALLS = re.findall(
    r"^\| `((?:m\.|with (?:m|perf)\.|MetricsCollector\(|memory_forecast\(|answers\.|perf\.|lb\.|lease\.).*?)` \|",
    TEXT,
    re.MULTILINE,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_written(program: str, server: Server, tmp_path: Path) -> None:
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


def test_tables_have_calls_of_each_service() -> None:
    for start, minimum in (("m.", 8), ("answers.", 4), ("perf.", 4), ("lb.", 7), ("lease.", 1)):
        assert sum(each.strip().startswith(start) for call in CALLS for each in call.split(";")) >= minimum


@pytest.fixture
def names(perf: AgentPerf) -> Iterator[dict[str, Any]]:
    """The variables that the calls use: a pool with free capacity, an agent with records, an instance and a lease."""
    lb = perf.balancer("consistent_hash")  # the only strategy that allows all calls in the tables
    instance = AgentInstance("coder-1", "coder", max_capacity=9, labels=frozenset({"gpu"}))
    lb.register_instance(instance)
    perf.metrics.record_execution("planner", 0.25, success=True)
    answers = perf.cache("answers")
    answers.put("b", 2, ttl=60)
    held = lb.acquire("coder")
    assert held is not None
    with lb.lease("coder") as lease:
        yield {
            **{name: getattr(agentperf_redis, name) for name in agentperf_redis.__all__},
            "perf": perf,
            "m": perf.metrics,
            "answers": answers,
            "lb": lb,
            "instance": held,
            "lease": lease,
        }
    lb.release(held)


@pytest.mark.parametrize("call", [call for call in CALLS if "wait_until_idle" not in call])
def test_calls_in_tables_run_as_written(call: str, names: dict[str, Any]) -> None:
    exec(call, names)
    for unreleased in [each for each in names["lb"].leases("coder").leases if each.token != names["lease"].token]:
        names["lb"].release_token("coder", unreleased.token)


def test_draining_call_in_tables_stops_new_leases(perf: AgentPerf) -> None:
    (call,) = (call for call in CALLS if "wait_until_idle" in call)
    lb = perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder"))
    exec(call, {"lb": lb})
    assert lb.acquire("coder") is None


def listed_keys() -> set[tuple[str, str]]:
    """Return the keys that the README lists, with their types.

    ``a|b`` in a key stands for two keys. The keys on one line have the same prefix, ``agentperf:`` or
    ``agentperf:{...}:``.
    """
    key = r"\S+ (?:HASH|ZSET|STRING|LIST|STREAM)\b"
    listed = set()
    for prefix, keys in re.findall(rf"^(agentperf:(?:{{\S+}}:)?)({key}(?:, {key})*)", TEXT, re.MULTILINE):
        for name, kind in (each.split(" ") for each in keys.split(", ")):
            parts = [part.split("|") for part in re.split(r"([:{}])", prefix + name)]
            listed |= {("".join(chosen), kind) for chosen in itertools.product(*parts)}
    return listed


def shown_state() -> list[tuple[str, str]]:
    """Return the hash fields that the README shows for the example pool. The server has these fields and more.

    On a line, three or more spaces separate fields, and ``-- `` begins a remark.
    """
    shown = re.search(r"hgetall 'agentperf:{lb:coder}:state'.*\n((?:[^\s`].*\n)+)", TEXT)
    assert shown is not None
    fields = [each for line in shown[1].splitlines() for each in re.split(r" {3,}", line) if not each.startswith("-- ")]
    return [(name, value) for name, _, value in (each.partition(" ") for each in fields)]


RULES = """
[[alert]]
name = "slow"
agents = "planner"
when = "tasks > 0"
window = "1m"
notify = ["ops"]
[[alert]]
name = "quiet"
agents = "coder"
when = "tasks > 0"
window = "1m"
[notify.ops]
command = ["true"]
"""


def test_listed_keys_and_shown_pool_are_those_on_the_server(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    lb = perf.balancer()
    for number in (1, 2, 3):
        labels = frozenset({"gpu"} if number == 2 else ())
        lb.register_instance(AgentInstance(f"coder-{number}", "coder", max_capacity=5, labels=labels))
    pool = Pool.of(namespace, "coder")
    perf.backend.run(commands.claim_checks(pool, 60_000, 8))
    for at_ms in (1, 2, 3):  # after three failed checks in a row, an instance is down
        perf.backend.run(commands.report_checks(pool, at_ms, [("coder-3", False)]))
    held = lb.acquire("coder")
    ended = lb.acquire("coder")
    assert ended is not None
    assert ended.lease is not None
    assert lb.release_token("coder", ended.lease.token)
    lru, tiered = perf.cache("docs", default_ttl=300), perf.tiered_cache("docs")
    for cache in (lru, tiered):
        cache.put("gone", 1, tags=("letters",))
        cache.invalidate_tags("letters")
        cache.delete("gone")
    lru.put("page", "hello")
    tiered.put("page", {"title": "Agents"}, "hot")
    tiered.put("draft", {"title": "Caches"})  # no tier is named, so the entry is a newcomer
    # The README lists only one entry key of this cache, the key of "page". So this test deletes the entry key of
    # "draft". The indexes still contain "draft".
    raw.delete(f"{namespace}:{{tiered:docs}}:e:draft")
    for took in (0.02, 0.0201, 0.0202):
        perf.metrics.record_execution("planner", took, success=True)
    perf.metrics.record_execution("planner", 0.0214, success=False, error_type="TimeoutError")
    with perf.metrics.span("planner", "think"):
        pass
    perf.metrics.flush()
    assert len(perf.metrics.workers()) == 1
    perf.backend.run(pool_history.sample(pool))
    for service in ("cache", "tiered"):
        perf.backend.run(cache_history.sample(key_names.cache(namespace, service, "docs")))
    perf.alerts.deploy(text=RULES)
    perf.alerts.silence("quiet", "1h")
    assert len(perf.alerts.evaluate(as_of=time.time() + 10).events) == 1

    def plain(key: str) -> str:
        """Replace the parts of a key that differ in each run."""
        key = re.sub(r":(10s|1m|1h|1d):20[-:T0-9]*:", r":\1:<UTC>:", key.replace(f"{namespace}:", "agentperf:"))
        return re.sub(r":w:.*", ":w:<process>", key)

    found = {(plain(key), raw.type(key).upper()) for key in raw.scan_iter(f"{namespace}:*")}
    assert listed_keys() == found

    state = raw.hgetall(f"{namespace}:{{lb:coder}}:state")
    shown = shown_state()
    stamp = re.compile(r"\b\d{12,}\b")
    assert {name[0] for name, _ in shown} == {"#", "c", "@"}  # fields of the pool, of an instance and of a lease
    by_name = {name: stamp.sub("*", value) for name, value in state.items() if name[0] != "@"}
    leases = {stamp.sub("*", value) for name, value in state.items() if name[0] == "@"}
    assert {stamp.sub("*", value) for name, value in shown if name[0] == "@"} <= leases
    for name, value in shown:
        if name[0] != "@":
            pattern = re.escape(stamp.sub("*", value)).replace(re.escape("..."), ".+")  # "..." stands for any text
            assert re.fullmatch(pattern, by_name[name]), name
    assert lb.release(held)


def subcommands(group: Any, words: tuple[str, ...] = ("agentperf",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from subcommands(found, (*words, name))
        else:
            yield (*words, name), found


COMMANDS = dict(subcommands(typer.main.get_command(app)))
ROWS = re.findall(r"^\| (`agentperf .*?) \|", TEXT, re.MULTILINE)


def named_commands(row: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the commands in the first cell of a row, with their options.

    A name without a group belongs to the same group as the previous command.
    """
    group: tuple[str, ...] = ()
    for span in re.findall(r"`(.*?)`", row):
        words = tuple(re.split(r" (?=[\[A-Z-])", span)[0].split())
        words = words if words[0] == "agentperf" else (*group, *words)
        group = words[:-1]
        if words != ("agentperf",):
            yield words, re.findall(r"--[\w-]+", span)


def test_table_of_commands_is_complete() -> None:
    assert {words for row in ROWS for words, _ in named_commands(row)} == set(COMMANDS)


@pytest.mark.parametrize("row", ROWS)
def test_named_options_of_commands_exist(row: str) -> None:
    for words, options in named_commands(row):
        known = {
            option for parameter in COMMANDS[words].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(options) <= known


def test_links_within_the_page_resolve() -> None:
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#(.*?)\)", TEXT))
    assert len(links) >= 10
    assert links <= anchors


def test_files_and_steps_named_for_contributors_exist() -> None:
    section = TEXT[TEXT.index("## Working on it") : TEXT.index("## Reference")]
    root = README.parent
    paths = [root / top for top in ("agentperf_redis", "lua", "tests", "findings", ".ci")]
    paths += [path for top in paths for path in top.rglob("*") if "__pycache__" not in path.parts]
    existing = {f"/{path.relative_to(root)}" + "/" * path.is_dir() for path in paths}
    named = re.findall(r"`([\w./]+(?:\.py|\.lua|/))`", section) + re.findall(r"^([\w./]+/) {2,}", section, re.MULTILINE)
    named = [name for name in named if "NAME" not in name]
    assert len(named) >= 25
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in existing)] == []
    steps = re.search(r"yields steps \((.*?)\)", section)
    assert steps is not None
    assert {name for name in re.findall(r"`(\w+)`", steps[1]) if not hasattr(command, name)} == set()


ADAPTERS = [path.stem for path in (README.parent / "agentperf_redis" / "integrations").glob("[!_]*.py")]


@pytest.mark.parametrize("adapter", [each for each in ADAPTERS if each not in ("shared", "starlette")])
def test_each_adapter_has_a_short_recipe(adapter: str) -> None:
    assert 1 <= len([line for line in recipe(adapter).splitlines() if line]) <= 12


def test_cited_tests_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    defined = {
        name
        for path in README.parent.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 10
    assert named - defined == set()


def record(url: str, namespace: str) -> bool:
    """Record and flush one execution, in a task of a process pool. The task does not close its AgentPerf."""
    perf = AgentPerf(url, namespace=namespace)
    perf.metrics.record_execution("planner", 0.1, success=True)
    return perf.metrics.flush()


def test_flush_at_end_of_pool_task_counts_it(server: Server, namespace: str, perf: AgentPerf) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(record, [(server.url, namespace)] * 4) == [True] * 4
    assert perf.metrics.snapshots()["planner"].task_count == 4


PICTURES = sorted((README.parent / "tests" / "data" / "pictures").glob("*"))


@pytest.mark.parametrize("picture", PICTURES, ids=[each.name for each in PICTURES])
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size <= 150_000


def test_pictures_of_the_readme_exist() -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', TEXT)
    assert [each for each in shown if not (README.parent / each).is_file()] == []
