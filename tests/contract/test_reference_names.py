"""Every public name of the in-memory version works here, or the README names its replacement."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

import agentperf_redis
from tests.support.places import README

NAMES: dict[str, tuple[str, ...]] = {
    "PerformanceMetrics": (
        "agent_name",
        "task_count",
        "success_count",
        "failure_count",
        "total_execution_time",
        "min_execution_time",
        "max_execution_time",
        "avg_execution_time",
        "p50_execution_time",
        "p95_execution_time",
        "p99_execution_time",
        "execution_times",
        "error_types",
        "last_execution",
        "update",
        "success_rate",
        "failure_rate",
        "get_summary",
    ),
    "MetricsCollector": (
        "metrics",
        "start_time",
        "get_or_create_metrics",
        "record_execution",
        "get_all_metrics",
        "get_system_summary",
    ),
    "CacheEntry": (
        "key",
        "value",
        "created_at",
        "expires_at",
        "access_count",
        "last_accessed",
        "is_expired",
        "access",
    ),
    "LRUCache": (
        "max_size",
        "default_ttl",
        "cache",
        "access_order",
        "hits",
        "misses",
        "get",
        "put",
        "clear",
        "get_stats",
    ),
    "TieredCache": ("hot", "warm", "cold", "get", "put", "get_stats"),
    "LoadBalancingStrategy": ("ROUND_ROBIN", "LEAST_LOADED", "WEIGHTED", "RANDOM"),
    "AgentInstance": (
        "id",
        "agent_type",
        "current_load",
        "max_capacity",
        "weight",
        "is_healthy",
        "response_time_ms",
        "load_percentage",
        "available_capacity",
    ),
    "LoadBalancer": (
        "strategy",
        "instances",
        "round_robin_index",
        "register_instance",
        "select_instance",
        "acquire",
        "release",
        "get_status",
    ),
}

FIRST_PARAMETERS: dict[str, tuple[str, ...]] = {
    "MetricsCollector.record_execution": ("agent_name", "execution_time", "success", "error_type"),
    "MetricsCollector.get_or_create_metrics": ("agent_name",),
    "LRUCache": ("max_size", "default_ttl"),
    "LRUCache.get": ("key",),
    "LRUCache.put": ("key", "value", "ttl"),
    "TieredCache": ("hot_size", "warm_size", "cold_size", "hot_ttl", "warm_ttl", "cold_ttl"),
    "TieredCache.get": ("key",),
    "TieredCache.put": ("key", "value", "priority"),
    "CacheEntry": ("key", "value", "created_at", "expires_at", "access_count", "last_accessed"),
    "AgentInstance": (
        "id",
        "agent_type",
        "current_load",
        "max_capacity",
        "weight",
        "is_healthy",
        "response_time_ms",
    ),
    "LoadBalancer": ("strategy",),
    "LoadBalancer.register_instance": ("instance",),
    "LoadBalancer.select_instance": ("agent_type",),
    "LoadBalancer.acquire": ("agent_type",),
    "LoadBalancer.release": ("instance",),
    "cached": ("cache", "ttl"),
    "track_performance": ("agent_name", "collector"),
}


def replaced() -> set[str]:
    """Return the names in the code spans of the README's section about the in-memory version."""
    text = README.read_text(encoding="utf-8")
    section = text.split("## Coming from the in-memory version", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"[A-Za-z_]+\.[A-Za-z_]+", " ".join(re.findall(r"`([^`]+)`", section))))


def has(cls: Any, name: str) -> bool:
    if dataclasses.is_dataclass(cls):
        return hasattr(cls, name) or name in {field.name for field in dataclasses.fields(cls)}
    made = inspect.getsource(cls.__init__) if "__init__" in vars(cls) else ""
    return hasattr(cls, name) or f"self.{name} =" in made or f"self.{name}:" in made


@pytest.mark.parametrize("owner", NAMES)
def test_every_name_works_or_has_a_replacement(owner: str) -> None:
    cls = getattr(agentperf_redis, owner)
    documented = replaced()
    missing = [name for name in NAMES[owner] if not has(cls, name) and f"{owner}.{name}" not in documented]
    assert missing == []


@pytest.mark.parametrize("call", FIRST_PARAMETERS)
def test_arguments_keep_their_names_and_positions(call: str) -> None:
    target: Any = agentperf_redis
    for part in call.split("."):
        target = getattr(target, part)
    parameters = [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    expected = list(FIRST_PARAMETERS[call])
    assert parameters[: len(expected)] == expected
