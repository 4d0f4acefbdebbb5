"""The blocking API and the asyncio API (`aio`) of a service have the same methods with the same behaviour."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cached_property
from typing import Any

import pytest

from agentperf_redis import LoadBalancer, Lock, LRUCache, MetricsCollector, Semaphore, TieredCache
from agentperf_redis.alerts.client import Alerts

CLIENTS: dict[str, type] = {
    "Alerts": Alerts,
    "LoadBalancer": LoadBalancer,
    "LRUCache": LRUCache,
    "TieredCache": TieredCache,
    "MetricsCollector": MetricsCollector,
    "Lock": Lock,
    "Semaphore": Semaphore,
}

WITHOUT_IO = {
    "Alerts": {"aio"},
    "LoadBalancer": {"aio", "check_strategy", "strategy"},
    "LRUCache": {"aio", "cached", "default_ttl", "max_size"},
    "TieredCache": {"aio", "cached"},
    "MetricsCollector": {
        "aio",
        "delivery",
        "record_cancellation",
        "record_execution",
        "record_llm",
        "record_stream",
        "record_tool_calls",
        "span",
        "start_time",
        "track",
    },
    "Lock": {"aio"},
    "Semaphore": {"aio", "limit"},
}
"""Public names that need no server, so the asyncio API has no counterparts of them."""

READ_BY: dict[str, dict[str, str]] = {
    "Alerts": {},
    "LoadBalancer": {"instances": "status"},
    "LRUCache": {"access_order": "keys", "cache": "entry", "hits": "stats", "misses": "stats"},
    "TieredCache": {"hits": "stats", "misses": "stats"},
    "MetricsCollector": {"metrics": "snapshots"},
    "Lock": {},
    "Semaphore": {},
}
"""Property of the in-memory version that now reads from the server -> the asyncio method that replaces the property."""

BODIES_DIFFER = {
    "run": "the blocking method stops a thread, the asyncio method ends by cancellation",
    "get_or_compute": "only the blocking method rejects coroutine functions",
    "warm_up": "only the blocking method rejects coroutine functions",
    "run_checks": "the blocking method stops a thread, the asyncio method ends by cancellation",
}


def aio_class(client: type) -> type:
    """Return the class in the return annotation of `aio`."""
    getter = inspect.getattr_static(client, "aio")
    function: Any = getter.fget if isinstance(getter, property) else getter.func
    annotation = inspect.signature(function, eval_str=True).return_annotation
    assert isinstance(annotation, type)
    return annotation


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers_static(cls) if not name.startswith("_")}


PAIRS = [
    (name, method)
    for name, client in CLIENTS.items()
    for method, value in public(aio_class(client)).items()
    if not isinstance(value, property)
]


def body(function: Any) -> list[str]:
    """Return the statements of a method without its docstring, rewritten as blocking code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    statements = tree.body[1:] if ast.get_docstring(tree) else tree.body
    text = [ast.unparse(statement) for statement in statements]
    blocking = [re.sub(r"\bawait |\bAsync(?=[A-Z])", "", line).replace(".arun(", ".run(") for line in text]
    return [ast.unparse(ast.parse(line)) for line in blocking]  # drops the parentheses around awaited calls


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda part: part)
def test_async_method_has_the_blocking_signature(name: str, method: str) -> None:
    blocking, value = inspect.getattr_static(CLIENTS[name], method), public(aio_class(CLIENTS[name]))[method]
    assert inspect.isfunction(blocking)
    assert inspect.isfunction(value)
    ours, theirs = inspect.signature(value), inspect.signature(blocking)
    assert list(ours.parameters.values()) == list(theirs.parameters.values())
    if inspect.iscoroutinefunction(value):
        returned = ours.return_annotation == theirs.return_annotation
        assert returned or method in ("run", "run_checks"), "these return when they are cancelled"
    else:
        assert ours.return_annotation == f"Async{theirs.return_annotation}", (
            "the result is for `async with` or `async for`"
        )
        result = inspect.signature(value, eval_str=True).return_annotation
        assert hasattr(result, "__aenter__") or hasattr(result, "__anext__")


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda part: part)
def test_async_method_refers_to_the_blocking_docstring(name: str, method: str) -> None:
    reference = re.match(r"See `(\w+)\.(\w+)`", public(aio_class(CLIENTS[name]))[method].__doc__ or "")
    assert reference, "its docstring is: See `Class.method`."
    owner = CLIENTS[reference[1]]
    documented = inspect.getattr_static(owner, reference[2])
    assert documented is inspect.getattr_static(CLIENTS[name], method), "the reference names another method"
    assert documented.__doc__


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda part: part)
def test_async_method_has_the_blocking_body(name: str, method: str) -> None:
    blocking, value = inspect.getattr_static(CLIENTS[name], method), public(aio_class(CLIENTS[name]))[method]
    same = body(value) == body(blocking)
    assert same != (method in BODIES_DIFFER), f"{body(value)} against {body(blocking)}"


@pytest.mark.parametrize("name", CLIENTS)
def test_public_names_with_io_have_async_counterparts(name: str) -> None:
    names, ours = public(CLIENTS[name]).keys(), public(aio_class(CLIENTS[name])).keys()
    assert ours, "an empty class would pass everything above"
    alone = names - ours
    assert alone == WITHOUT_IO[name] | READ_BY[name].keys()
    assert set(READ_BY[name].values()) <= ours


@pytest.mark.parametrize("name", CLIENTS)
def test_names_without_io_never_run_a_flow(name: str) -> None:
    for method in WITHOUT_IO[name]:
        value = inspect.getattr_static(CLIENTS[name], method)
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        elif isinstance(value, staticmethod):
            value = value.__func__
        assert "_backend.run(" not in inspect.getsource(value), method


@pytest.mark.parametrize("name", CLIENTS)
def test_clients_are_defined_in_their_modules(name: str) -> None:
    blocking, asyncio_one = CLIENTS[name], aio_class(CLIENTS[name])
    package = blocking.__module__.rpartition(".")[0]
    assert asyncio_one.__module__ == f"{package}.async_client"
    assert asyncio_one.__name__ == f"Async{name}"
    assert not any(inspect.iscoroutinefunction(value) for value in public(blocking).values())
