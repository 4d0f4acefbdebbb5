"""The blocking and the asyncio methods of each client are the same, but for `async`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from agentperf_redis import LoadBalancer, LRUCache, MetricsCollector, TieredCache

CLIENTS: dict[str, type] = {
    "LoadBalancer": LoadBalancer,
    "LRUCache": LRUCache,
    "TieredCache": TieredCache,
    "MetricsCollector": MetricsCollector,
}


def aio_class(client: type) -> type:
    """The class of what `.aio` returns, by its annotation."""
    getter = inspect.getattr_static(client, "aio")
    function: Any = getter.fget if isinstance(getter, property) else getter.func
    annotation = inspect.signature(function, eval_str=True).return_annotation
    assert isinstance(annotation, type)
    return annotation


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers_static(cls) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLIENTS)
def test_each_asyncio_method_has_its_blocking_twin(name: str) -> None:
    client, aio = CLIENTS[name], aio_class(CLIENTS[name])
    methods = {method: value for method, value in public(aio).items() if inspect.isfunction(value)}
    assert methods, "an empty facade would pass everything below"
    for method, value in methods.items():
        twin = inspect.getattr_static(client, method)
        if isinstance(twin, property):  # an attribute of the in-memory version that reads the server
            twin = twin.fget
        assert inspect.isfunction(twin), f"{name}.{method} has no blocking twin"
        ours, theirs = inspect.signature(value), inspect.signature(twin)
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), f"{name}.{method}"
        assert twin.__doc__, f"{name}.{method} has no docstring"


@pytest.mark.parametrize("name", CLIENTS)
def test_each_blocking_method_that_talks_to_the_server_has_its_asyncio_twin(name: str) -> None:
    client, aio = CLIENTS[name], aio_class(CLIENTS[name])
    twins = public(aio)
    for method, value in public(client).items():
        if inspect.isfunction(value) and "_backend.run(" in inspect.getsource(value):
            assert method in twins, f"{name}.{method} has no asyncio twin"
