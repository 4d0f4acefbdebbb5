"""Caches without a name: each place in a program makes one cache, which all processes of the program share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf
from tests.support.places import ROOT
from tests.support.servers import Raw, Server

SHOP = """
from dataclasses import dataclass, field
from agentperf_redis import LRUCache, TieredCache

class Small(LRUCache):
    def __init__(self):
        super().__init__(max_size=2)

@dataclass
class Config:
    users: LRUCache = field(default_factory=LRUCache)
    orders: LRUCache = field(default_factory=lambda: LRUCache(max_size=9))

class Agent:
    def __init__(self):
        self.answers = LRUCache()

users = LRUCache(max_size=100, default_ttl=60)
orders = LRUCache(max_size=100, default_ttl=60)
small, more = Small(), Small()
tiers, other_tiers = TieredCache(), TieredCache(hot_size=5)
config = Config()

def per_call():
    return LRUCache()

ALL = [users, orders, small, more, tiers, other_tiers, config.users, config.orders, per_call(), Agent().answers]
"""
NAMES = [
    *("shop.users", "shop.orders", "shop.small-Small", "shop.more-Small", "shop.tiers", "shop.other_tiers"),
    *("shop.Config.users", "shop.Config.orders", "shop.per_call", "shop.Agent.answers"),
]

Execute = Callable[[str], str]


@pytest.fixture
def execute(server: Server, namespace: str, tmp_path: Path) -> Execute:
    """Return a function that runs a program in a process of its own, with the module `shop`, and returns its output."""
    (tmp_path / "shop.py").write_text(SHOP)
    place = {"AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}

    def run(program: str) -> str:
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(
            command, env=os.environ | place, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    return run


@pytest.mark.thorough
def test_each_place_is_one_cache_of_all_processes(
    execute: Execute, server: Server, namespace: str, tmp_path: Path
) -> None:
    execute("import shop\nfor number, cache in enumerate(shop.ALL): cache.put('k', number)")
    assert execute("import shop; print([cache.get('k') for cache in shop.ALL])") == str(list(range(len(NAMES))))
    execute("import shop\nfor number in range(30): shop.small.put(str(number), 0)")
    assert execute("import shop; shop.users.clear(); print([len(cache) for cache in shop.ALL])") == str(
        [0, 1, 2, *[1] * 7]
    ), "no cache evicts or clears the entries of another"
    with AgentPerf(server.url, namespace=namespace) as perf:
        assert sorted(stats.name for stats in perf.caches()) == sorted(NAMES)


@pytest.mark.thorough
def test_place_run_many_times_adds_no_names(execute: Execute, raw: Raw, namespace: str) -> None:
    program = (
        "import shop\nfor number in range(60):\n    shop.per_call().put('k', number); shop.Agent().answers.put('k', 0)"
    )
    execute(program)
    execute(program)
    used = raw.zrange(f"{namespace}:resources", 0, -1)
    assert sorted(used) == ["cache:shop.Agent.answers", "cache:shop.per_call"]


def test_same_variable_of_two_modules_is_two_caches(execute: Execute, tmp_path: Path) -> None:
    for module in ("one", "two"):
        (tmp_path / f"{module}.py").write_text("from agentperf_redis import LRUCache\nusers = LRUCache()\n")
    execute("import one; one.users.put('k', 1)")
    assert execute("import one, two; print(one.users.get('k'), two.users.get('k'))") == "1 None"


@pytest.mark.thorough
def test_command_line_lists_unnamed_caches(execute: Execute) -> None:
    program = """
import os, sys, shop
from agentperf_redis.cli import main
shop.users.put("k", "Alice")
os.environ.pop("COLUMNS", None)
sys.argv[1:] = ["cache", "list"]
main()
"""
    assert "shop.users " in execute(program)
