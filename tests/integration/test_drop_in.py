"""Programs written for the in-memory version run here. Only their import line was changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commandline import said
from tests.support.places import ROOT
from tests.support.servers import Server

QUICK_REFERENCE = """
from agentperf_redis import LoadBalancer, LoadBalancingStrategy, LRUCache, MetricsCollector, cached, track_performance

# Metrics collection
collector = MetricsCollector()

@track_performance("agent-name", collector)
async def task():
    # Task implementation
    pass

# Caching
cache = LRUCache(max_size=1000, default_ttl=300)

@cached(cache, ttl=60)
async def expensive_task():
    # Task implementation
    pass

# Load balancing
lb = LoadBalancer(strategy=LoadBalancingStrategy.LEAST_LOADED)
instance = lb.acquire("agent-type")
# Use instance
lb.release(instance)
"""

QUICK_REFERENCE_USED = (
    QUICK_REFERENCE
    + """
import asyncio
asyncio.run(task())
asyncio.run(expensive_task())
asyncio.run(expensive_task())
print(instance, collector.get_all_metrics()["agent-name"]["task_count"], cache.get_stats()["hits"])
"""
)

METRICS_DEMO = """
import asyncio
from agentperf_redis import MetricsCollector, track_performance

collector = MetricsCollector()

@track_performance("ml-engineer", collector)
async def train_model(data):
    await asyncio.sleep(0.02)
    if data["data"] == "dataset-3":
        raise ValueError("no labels")
    return {"accuracy": 0.95}

async def demo():
    for i in range(10):
        try:
            await train_model({"data": f"dataset-{i}"})
        except Exception:
            pass

    metrics = collector.get_all_metrics()
    print("Agent Metrics:")
    for agent, stats in metrics.items():
        print(f"{agent}:")
        for key, value in stats.items():
            print(f"  {key}: {value}")

    print("System Summary:")
    summary = collector.get_system_summary()
    for key, value in summary.items():
        if key != "agent_rankings":
            print(f"  {key}: {value}")
    print(summary["agent_rankings"][0]["agent"])

asyncio.run(demo())
"""

CACHE_DEMO = """
import asyncio
from agentperf_redis import LRUCache, cached

cache = LRUCache(max_size=100, default_ttl=300)
calls = 0

@cached(cache, ttl=60)
async def expensive_computation(x: int, y: int) -> int:
    global calls
    calls += 1
    await asyncio.sleep(0.02)
    return x ** y

async def demo_caching():
    result1 = await expensive_computation(2, 10)
    print(f"Result: {result1}")
    result2 = await expensive_computation(2, 10)
    print(f"Result: {result2}")
    stats = cache.get_stats()
    print(f"Cache stats: {stats}")
    print(f"calls: {calls}")

asyncio.run(demo_caching())
"""

BALANCER_DEMO = """
from agentperf_redis import AgentInstance, LoadBalancer, LoadBalancingStrategy

def demo_load_balancing():
    lb = LoadBalancer(strategy=LoadBalancingStrategy.LEAST_LOADED)

    for i in range(3):
        lb.register_instance(AgentInstance(
            id=f"ml-engineer-{i}",
            agent_type="ml-engineer",
            max_capacity=5
        ))

    print("Distributing tasks...")
    active_instances = []

    for i in range(10):
        instance = lb.acquire("ml-engineer")
        if instance:
            print(f"Task {i} -> {instance.id} (load: {instance.current_load}/{instance.max_capacity})")
            active_instances.append(instance)

    for instance in active_instances[:5]:
        lb.release(instance)

    print("Load Balancer Status:")
    status = lb.get_status()
    for agent_type, info in status.items():
        print(f"{agent_type}:")
        print(f"  Load: {info['current_load']}/{info['total_capacity']} ({info['load_percentage']})")
        for inst_detail in info['instances_detail']:
            print(f"    {inst_detail['id']}: {inst_detail['load']} ({inst_detail['load_pct']})")
    for instance in active_instances[5:]:
        lb.release(instance)

demo_load_balancing()
"""

SEVERAL_OBJECTS = """
from agentperf_redis import AgentInstance, LoadBalancer, LRUCache, MetricsCollector, TieredCache

users = LRUCache(max_size=100, default_ttl=60)
orders = LRUCache(max_size=100, default_ttl=60)
small = LRUCache(max_size=2)
tiers, other_tiers = TieredCache(), TieredCache(hot_size=5)
users.put("1", "Alice")
tiers.put("1", "Alice")
print(orders.get("1"), other_tiers.get("1"))
orders.clear()
for number in range(20):
    users.put(f"u{number}", number)
small.put("1", "Bob")
print(users.get("1"), len(users), small.get("1"))
one, other = MetricsCollector(), MetricsCollector()
for collector in (one, other):
    collector.record_execution("planner", 0.1, True)
print(MetricsCollector().get_all_metrics()["planner"]["task_count"])
in_turn, weighted = LoadBalancer("round_robin"), LoadBalancer("weighted")
in_turn.register_instance(AgentInstance(id="a", agent_type="coder"))
weighted.register_instance(AgentInstance(id="b", agent_type="critic"))
for balancer, agent in ((in_turn, "coder"), (weighted, "critic")):
    instance = balancer.acquire(agent)
    print(instance.id, balancer.strategy.value)
    balancer.release(instance)
"""


@pytest.fixture
def execute(start_server: Callable[..., Server], tmp_path: Path) -> Callable[[str], list[str]]:
    """Run a program in a separate process with a fresh server, and return its output lines.

    Programs of the in-memory version make blocking calls in coroutines. Such programs still run. Each place that makes
    a blocking call causes one warning.
    """
    server = start_server("valkey")

    def run(program: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::RuntimeWarning", "-c", program],
            env={**os.environ, "AGENTPERF_REDIS_URL": server.url, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, said(done.stderr)) == (0, [])
        return done.stdout.splitlines()

    return run


def test_quick_reference_runs_unchanged(execute: Callable[[str], list[str]]) -> None:
    assert execute(QUICK_REFERENCE) == []


def test_quick_reference_prints_expected_results(execute: Callable[[str], list[str]]) -> None:
    assert execute(QUICK_REFERENCE_USED) == ["None 1 1"]


def test_several_objects_of_a_kind_run_side_by_side(execute: Callable[[str], list[str]]) -> None:
    assert execute(SEVERAL_OBJECTS) == ["None None", "Alice 21 Bob", "2", "a round_robin", "b weighted"]


def test_metrics_demo_prints_expected_figures(execute: Callable[[str], list[str]]) -> None:
    lines = execute(METRICS_DEMO)
    assert lines[0:4] == ["Agent Metrics:", "ml-engineer:", "  agent_name: ml-engineer", "  task_count: 10"]
    assert "  success_rate: 90.0%" in lines
    (half,) = [line for line in lines if line.startswith("  p50_execution_time: ")]
    shown = re.fullmatch(r"  p50_execution_time: (\d+\.\d\d)s", half)
    assert shown is not None
    assert float(shown[1]) >= 0.02, "at least its sleep time, and longer on a busy machine"
    assert "  top_errors: {'ValueError': 1}" in lines
    assert "  total_tasks: 10" in lines
    assert "  overall_success_rate: 90.0%" in lines
    assert "  active_agents: 1" in lines
    assert lines[-1] == "ml-engineer"


def test_cache_demo_computes_its_value_once(execute: Callable[[str], list[str]]) -> None:
    lines = execute(CACHE_DEMO)
    assert lines[:2] == ["Result: 1024", "Result: 1024"]
    for part in (
        "'size': 1",
        "'max_size': 100",
        "'hits': 1",
        "'misses': 1",
        "'hit_rate': '50.0%'",
        "'total_requests': 2",
    ):
        assert part in lines[2]
    assert lines[3] == "calls: 1"


def test_balancer_demo_spreads_load_over_instances(execute: Callable[[str], list[str]]) -> None:
    lines = execute(BALANCER_DEMO)
    grants = [line for line in lines if line.startswith("Task")]
    assert len(grants) == 10
    assert grants[0] == "Task 0 -> ml-engineer-0 (load: 1/5)"
    assert sum("ml-engineer-1" in line for line in grants) in (3, 4)
    assert "  Load: 5/15 (33.3%)" in lines
    assert len([line for line in lines if line.startswith("    ml-engineer-")]) == 3
