"""Every public argument that takes a name refuses values of other kinds. The InvalidArgument names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, LoadBalancer, LRUCache, MetricsCollector, TieredCache
from agentperf_redis.backend import Backend
from agentperf_redis.errors import InvalidArgument

NAMES = {
    *(
        "name",
        "namespace",
        "agent",
        "agent_type",
        "agent_types",
        "agent_name",
        "agent_names",
        "instance_id",
        "instance_ids",
    ),
    *("key", "keys", "tags", "token", "id", "strategy", "policy", "on_unavailable", "affinity", "after"),
}
"""The parameters that take a name or several names."""
OTHERS: tuple[Any, ...] = (["l"], {1: "a"}, {1}, b"x", 1, 1.5, object(), [["l"]], True)
"""Values that are no names. Some of them are collections, and some are not hashable."""
COLLECTIONS = {"agent_types", "agent_names", "instance_ids", "keys", "tags"}
NOWHERE = "redis://127.0.0.1:1"


def public(perf: AgentPerf) -> dict[str, Callable[..., Any]]:
    """Return every public method and constructor, by name."""
    clients = {"perf": perf, "lb": perf.balancer(), "cache": perf.cache("c"), "tiered": perf.tiered_cache("c")}
    found: dict[str, Callable[..., Any]] = {
        f"{client}.{name}": getattr(clients[client], name)
        for client, of in (*clients.items(), ("metrics", perf.metrics))
        for name, member in inspect.getmembers(type(of))
        if client != "metrics" and not name.startswith("_") and inspect.isfunction(member)
    }
    found |= {
        f"metrics.{name}": getattr(perf.metrics, name)
        for name, member in inspect.getmembers(MetricsCollector)
        if not name.startswith("_") and inspect.isfunction(member)
    }
    return found | {each.__name__: each for each in (AgentInstance, LoadBalancer, LRUCache, TieredCache, AgentPerf)}


def attempts(function: Callable[..., Any], backend: Backend) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Yield calls that pass something other than a name. Each item begins with the parameter's name."""
    parameters = inspect.signature(function).parameters.values()
    required: dict[str, Any] = {
        each.name: "a"
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    if inspect.isclass(function) and "backend" in inspect.signature(function).parameters:
        required["backend"] = backend  # without it, a client would create the default backend
    for parameter in parameters:
        if parameter.name in NAMES:
            for other in OTHERS:
                if parameter.kind is parameter.VAR_POSITIONAL:
                    yield parameter.name, (other,), {}
                elif not (parameter.name in COLLECTIONS and other == ["l"]):
                    yield parameter.name, (), {**required, parameter.name: other}


def test_names_of_another_kind_are_refused() -> None:
    perf = AgentPerf(NOWHERE, deadline=0.05)
    tried, wrong = set(), []
    for where, function in public(perf).items():
        for parameter, args, options in attempts(function, perf.backend):
            tried.add(f"{where}({parameter})")
            try:
                function(*args, **options)
            except InvalidArgument:
                continue
            except Exception as error:  # noqa: BLE001  any other error is what this test looks for
                wrong.append(f"{where}({args or options}): {type(error).__name__}: {error}")
    assert {"perf.cache(name)", "perf.tiered_cache(name)", "lb.acquire(agent_type)", "LRUCache(name)"} <= tried
    assert wrong == []


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_name_of_a_cache_is_named_in_the_error(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="name") as caught:
        AgentPerf(NOWHERE).cache(value)
    assert caught.value.argument == "name"
